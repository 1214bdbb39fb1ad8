//! Dispatch and combine of whole layers' rows: bytes against the ideal, time against a plain call
//! that moves the same bytes, in one run.
//!
//! ```text
//! exchange_bench [--ranks 2,4] [--tokens 1,16,128,512,2048] [--repeats N] [--json FILE]
//! mpirun -n N exchange_bench …          the same over processes
//! ```
//! Shapes of qwen3-30b-a3b: H 2048, k 8 of 128 experts, random routing, the experts in equal runs
//! over the ranks. T is the number of rows of each rank. What arrives is compared with what was sent
//! before anything is timed.
//!
//! *Bytes* are those that leave a rank, summed over ranks. The ideal dispatch sends each row once to
//! each rank that owns one of its experts: the values, without ids and weights. For the combine two
//! numbers: against one f32 row for each slot, which is what a sum in slot order needs, and against
//! one for each row and owning rank, which is what ranks that add before they send would need.
//!
//! *Time* is from the first rank's start to the last rank's end: start and finish of each step, so packing, unpacking and (for the combine)
//! the weighted sum are in it, and the ratio to the plain call is above one by what they cost.

#[path = "plain/mod.rs"]
mod plain;

use std::hint::black_box;
use std::sync::Arc;

use moe_kernels::pool::Inline;
use moe_runner::comm::{At, Communicator, Kind, Step, mpi, run_ranks};
use moe_runner::exchange::{
    AllToAllExchange, Completeness, Exchange, ExpertMap, GatherExchange, LocalRows, SlotRows, Wire,
};
use moe_runner::hidden::ActivationDtype;
use moe_runner::plan::{NO_EXPERT, NO_PLACE};
use moe_runner::random::Random;
use moe_runner::router::{LocalId, LogicalId, Routing};
use moe_runner::{Error, Result};
use plain::{Plain, PlainMpi, Times};
use serde::Serialize;

const HIDDEN: usize = 2048;
const TOP_K: usize = 8;
const EXPERTS: usize = 128;
/// Repeats that are not counted.
const WARM_UP: usize = 3;

/// What the command line asks for.
struct Options {
    ranks: Vec<usize>,
    tokens: Vec<usize>,
    repeats: usize,
    json: Option<String>,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let launched = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];
    let mut lines = Vec::new();
    if launched.iter().any(|name| std::env::var_os(name).is_some()) {
        let comm = mpi::open()?;
        lines = bench(&comm, &Plain::Mpi(PlainMpi::find()), &options)?;
        if comm.rank() > 0 {
            return Ok(());
        }
    } else {
        for &ranks in &options.ranks {
            let mut of_ranks = run_ranks(ranks, |comm| bench(comm, &Plain::Copy, &options))?;
            lines.append(&mut of_ranks[0]);
        }
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&lines).expect("plain data");
        std::fs::write(path, text).map_err(|source| Error::Io {
            path: path.into(),
            action: "write",
            source,
        })?;
    }
    Ok(())
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            ranks: vec![2, 4],
            tokens: vec![1, 16, 128, 512, 2048],
            repeats: 30,
            json: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let value = args.next().unwrap_or_default();
            let bad = |_| Error::input("arguments", format!("{flag} cannot be '{value}'"));
            let numbers =
                || value.split(',').map(str::parse).collect::<std::result::Result<Vec<_>, _>>();
            match flag.as_str() {
                "--ranks" => options.ranks = numbers().map_err(bad)?,
                "--tokens" => options.tokens = numbers().map_err(bad)?,
                "--repeats" => options.repeats = value.parse().map_err(bad)?,
                "--json" => options.json = Some(value),
                _ => return Err(Error::input("arguments", format!("unknown flag '{flag}'"))),
            }
        }
        Ok(options)
    }
}

/// One line of the table.
#[derive(Clone, Serialize)]
struct Line {
    comm: String,
    ranks: usize,
    exchange: &'static str,
    wire: &'static str,
    tokens_per_rank: usize,
    dispatch: Phase,
    /// Ids and weights, as a share of the bytes of a row.
    dispatch_overhead: f64,
    combine: Phase,
    /// Bytes against one f32 row for each row and owning rank.
    combine_over_row_per_rank: f64,
    plain: &'static str,
}

/// Bytes that left all ranks, and times in microseconds.
#[derive(Clone, Serialize)]
struct Phase {
    bytes: u64,
    over_ideal: f64,
    median: f64,
    min: f64,
    max: f64,
    plain_median: f64,
    plain_min: f64,
    /// Of the medians.
    over_plain: f64,
}

fn bench(comm: &Arc<dyn Communicator>, plain: &Plain, options: &Options) -> Result<Vec<Line>> {
    if comm.rank() == 0 {
        println!("{} ranks, {}: H {HIDDEN}, k {TOP_K} of {EXPERTS}", comm.size(), comm.name());
        println!(
            "{:<12} {:<4} {:>5} | {:>9} {:>6} {:>21} {:>7} | {:>9} {:>6} {:>6} {:>21} {:>7}",
            "exchange",
            "wire",
            "T",
            "dispatch",
            "÷ideal",
            "µs median (min-max)",
            "÷plain",
            "combine",
            "÷slots",
            "÷ranks",
            "µs median (min-max)",
            "÷plain"
        );
    }
    let wires = [("bf16", ActivationDtype::Bf16), ("f32", ActivationDtype::F32)];
    let mut lines = Vec::new();
    for (wire_name, dtype) in wires {
        for &tokens in &options.tokens {
            for gather in [false, true] {
                let case = Case::new(comm, gather, dtype, tokens)?;
                let line = case.line(plain, wire_name, options.repeats)?;
                if comm.rank() == 0 {
                    print(&line);
                }
                lines.push(line);
            }
        }
    }
    Ok(lines)
}

fn print(line: &Line) {
    let times = |p: &Phase| format!("{:.0} ({:.0}-{:.0})", p.median, p.min, p.max);
    let Line { dispatch, combine, .. } = line;
    println!(
        "{:<12} {:<4} {:>5} | {:>9.3} {:>6.3} {:>21} {:>7.2} | {:>9.3} {:>6.3} {:>6.3} {:>21} {:>7.2}",
        line.exchange.split(' ').next().unwrap_or_default(),
        line.wire,
        line.tokens_per_rank,
        dispatch.bytes as f64 / 1e6,
        dispatch.over_ideal,
        times(dispatch),
        dispatch.over_plain,
        combine.bytes as f64 / 1e6,
        combine.over_ideal,
        line.combine_over_row_per_rank,
        times(combine),
        combine.over_plain,
    );
}

/// One exchange with the rows of all ranks.
struct Case<'a> {
    comm: &'a Arc<dyn Communicator>,
    exchange: Box<dyn Exchange>,
    gather: bool,
    dtype: ActivationDtype,
    map: Arc<ExpertMap>,
    tokens: usize,
    routings: Vec<Routing>,
    hidden: Vec<f32>,
}

/// A value that every dtype holds exactly, and that tells rank, row and column.
fn value(rank: usize, t: usize, col: usize) -> f32 {
    ((rank * 61 + t * 7 + col * 3) % 256) as f32
}

/// What the bench's "expert" makes of a value.
fn expert(id: LogicalId, value: f32) -> f32 {
    value * (1 + id.index()) as f32
}

/// `tokens` rows, each to k experts that differ.
fn routing(rank: usize, tokens: usize) -> Result<Routing> {
    let mut random = Random::new(rank as u64);
    let mut all: Vec<LogicalId> = (0..EXPERTS as u32).map(LogicalId).collect();
    let mut ids = Vec::new();
    for _ in 0..tokens {
        for j in 0..TOP_K {
            all.swap(j, j + random.bits() as usize % (EXPERTS - j));
        }
        ids.extend_from_slice(&all[..TOP_K]);
    }
    let weights = (0..ids.len()).map(|_| random.unit() as f32).collect();
    Routing::from_parts(TOP_K, ids, weights)
}

impl<'a> Case<'a> {
    fn new(
        comm: &'a Arc<dyn Communicator>,
        gather: bool,
        dtype: ActivationDtype,
        tokens: usize,
    ) -> Result<Self> {
        let n = comm.size();
        let held = |rank| (0..EXPERTS).filter(move |e| e * n / EXPERTS == rank);
        let by_rank: Vec<Vec<_>> =
            (0..n).map(|rank| held(rank).map(|e| LogicalId(e as u32)).collect()).collect();
        let map = Arc::new(ExpertMap::new(EXPERTS, &by_rank)?);
        let (wire, group) = (Wire::exact(dtype, false), comm.clone());
        let exchange: Box<dyn Exchange> = match gather {
            true => Box::new(GatherExchange::new(
                "bench",
                group,
                (map.clone(), comm.rank()),
                Completeness::Complete,
                wire,
            )),
            false => Box::new(AllToAllExchange::new("bench", group, map.clone(), None, wire)),
        };
        let routings = (0..n).map(|rank| routing(rank, tokens)).collect::<Result<Vec<_>>>()?;
        let row = |t| (0..HIDDEN).map(move |col| value(comm.rank(), t, col));
        let hidden = (0..tokens).flat_map(row).collect();
        Ok(Self { comm, exchange, gather, dtype, map, tokens, routings, hidden })
    }

    /// Ranks that own an expert of row `t` of `rank`.
    fn owners(&self, rank: usize, t: usize) -> Vec<usize> {
        let ids = &self.routings[rank].ids[t * TOP_K..][..TOP_K];
        let mut owners: Vec<_> =
            ids.iter().filter_map(|id| self.map.home(*id, t)).map(|home| home.rank).collect();
        owners.sort_unstable();
        owners.dedup();
        owners
    }

    /// Runs the steps once; `check` compares what arrived and fills the experts' rows.
    fn pass(
        &mut self,
        (slots, places): (&mut Vec<f32>, &mut Vec<u32>),
        out: &mut [f32],
        [dispatch, combine]: &mut [Times; 2],
        check: bool,
    ) -> Result<()> {
        let me = self.comm.rank();
        let routing = &self.routings[me];
        let rows = LocalRows::new(&self.hidden, HIDDEN, routing);
        let exchange = &mut self.exchange;
        let dispatched = dispatch.measure(&**self.comm, || {
            exchange.start_dispatch(0, rows, &Inline)?;
            exchange.finish_dispatch(0, rows, &Inline)
        })?;
        if check {
            let arrived: Vec<(usize, usize)> = (0..self.comm.size())
                .flat_map(|rank| (0..self.tokens).map(move |t| (rank, t)))
                .collect();
            let held = self.map.held_by(me);
            // every slot's row has a place, those without an expert none
            slots.clear();
            slots.resize(dispatched.ids.len() * HIDDEN, f32::NAN);
            places.clear();
            let place = |(slot, id): (usize, &LocalId)| match *id {
                NO_EXPERT => NO_PLACE,
                _ => slot as u32,
            };
            places.extend(dispatched.ids.iter().enumerate().map(place));
            let mut rows = dispatched.hidden.chunks_exact(HIDDEN).enumerate();
            for (rank, t) in arrived {
                let routing = &self.routings[rank];
                let ids = &routing.ids[t * TOP_K..][..TOP_K];
                if !self.gather && !ids.iter().any(|id| held.contains(id)) {
                    continue;
                }
                let (row, values) = rows.next().expect("a row is missing");
                for (col, v) in values.iter().enumerate() {
                    assert_eq!(*v, value(rank, t, col), "rank {rank}, row {t}, column {col}");
                }
                for (j, id) in ids.iter().enumerate() {
                    let slot = row * TOP_K + j;
                    assert_eq!(dispatched.weights[slot], routing.weights[t * TOP_K + j]);
                    let local = dispatched.ids[slot];
                    assert_eq!(
                        held.get(local.index()).unwrap_or(&LogicalId(u32::MAX)),
                        match held.contains(id) {
                            true => id,
                            false => &LogicalId(NO_EXPERT.0),
                        }
                    );
                    let to = &mut slots[slot * HIDDEN..][..HIDDEN];
                    to.iter_mut().zip(values).for_each(|(to, v)| *to = expert(*id, *v));
                }
            }
            assert!(rows.next().is_none(), "a row too many");
        }
        let done = SlotRows { values: slots, width: HIDDEN, places, weighted: false };
        combine.measure(&**self.comm, || {
            self.exchange.start_combine(0, done, &Inline)?;
            self.exchange.finish_combine(0, rows, done, out, &Inline)
        })?;
        if check {
            self.check_sums(out);
        }
        Ok(())
    }

    /// Sums in slot order are exact; those of the gather are grouped by rank.
    fn check_sums(&self, out: &[f32]) {
        let me = self.comm.rank();
        let Routing { ids, weights, .. } = &self.routings[me];
        for (t, out) in out.chunks_exact(HIDDEN).enumerate() {
            for (col, out) in out.iter().enumerate() {
                let mut want = 0.0;
                for slot in t * TOP_K..(t + 1) * TOP_K {
                    want += weights[slot] * expert(ids[slot], value(me, t, col));
                }
                let bound = if self.gather { 1e-5 * want.abs() } else { 0.0 };
                assert!((out - want).abs() <= bound, "row {t}, column {col}: {out}, not {want}");
            }
        }
    }

    fn line(mut self, plain: &Plain, wire: &'static str, repeats: usize) -> Result<Line> {
        let (n, me) = (self.comm.size(), self.comm.rank());
        let (mut slots, mut places) = (Vec::new(), Vec::new());
        let mut out = vec![0.0; self.tokens * HIDDEN];
        let before = self.comm.traffic().read();
        self.pass((&mut slots, &mut places), &mut out, &mut Default::default(), true)?;
        let traffic = self.comm.traffic().read().since(&before);
        let sent = match self.gather {
            true => [Kind::AllGatherV, Kind::ReduceScatterV].map(|kind| traffic.of(kind).sent),
            false => {
                // one counter for both directions: slots are known, the rest is the dispatch
                let back = |rank: usize| {
                    let home = |(slot, id): (usize, &LogicalId)| self.map.home(*id, slot / TOP_K);
                    let ids = self.routings[rank].ids.iter().enumerate();
                    ids.filter_map(home).filter(|home| home.rank == me).count()
                };
                let slots: usize = (0..n).filter(|rank| *rank != me).map(back).sum();
                let combine = (slots * HIDDEN * 4) as u64;
                [traffic.of(Kind::AllToAllV).sent - combine, combine]
            }
        };

        // (rows to other owning ranks, slots of other ranks), over all ranks
        let mut ideal = [0, 0];
        for rank in 0..n {
            for t in 0..self.tokens {
                ideal[0] += self.owners(rank, t).iter().filter(|owner| **owner != rank).count();
                let ids = &self.routings[rank].ids[t * TOP_K..][..TOP_K];
                let homes = ids.iter().filter_map(|id| self.map.home(*id, t));
                ideal[1] += homes.filter(|home| home.rank != rank).count();
            }
        }
        let [rows, slots_of_others] = ideal.map(|count| count.max(1) as f64);
        let row = (HIDDEN * self.dtype.size()) as f64;

        let (mut ours, mut plains): ([Times; 2], [Times; 2]) = Default::default();
        let matrices = self.matrices();
        for _ in 0..repeats + WARM_UP {
            self.pass((&mut slots, &mut places), &mut out, &mut ours, false)?;
            for (times, matrix) in plains.iter_mut().zip(&matrices) {
                self.plain(plain, matrix, times)?;
            }
        }
        let sorted = |times: Times| times.sorted(&**self.comm, WARM_UP);
        let ([dispatch, combine], [plain_dispatch, plain_combine]) = (ours, plains);
        let (dispatch, plain_dispatch) = (sorted(dispatch)?, sorted(plain_dispatch)?);
        let (combine, plain_combine) = (sorted(combine)?, sorted(plain_combine)?);
        let sent = self.comm.all_gather(at(), sent)?;
        let bytes = |i: usize| sent.chunks_exact(2).map(|sent| sent[i]).sum::<u64>();
        let phase = |bytes: u64, ideal: f64, times: Vec<f64>, plain: Vec<f64>| {
            let median = |times: &[f64]| times[times.len() / 2];
            Phase {
                bytes,
                over_ideal: bytes as f64 / ideal,
                median: median(&times),
                min: times[0],
                max: times[times.len() - 1],
                plain_median: median(&plain),
                plain_min: plain[0],
                over_plain: median(&times) / median(&plain),
            }
        };
        Ok(Line {
            comm: self.comm.name(),
            ranks: n,
            exchange: self.exchange.name(),
            wire,
            tokens_per_rank: self.tokens,
            dispatch: phase(bytes(0), rows * row, dispatch, plain_dispatch),
            dispatch_overhead: (TOP_K * 8) as f64 / row,
            combine: phase(bytes(1), slots_of_others * (HIDDEN * 4) as f64, combine, plain_combine),
            combine_over_row_per_rank: bytes(1) as f64 / (rows * (HIDDEN * 4) as f64),
            plain: plain.name(),
        })
    }

    /// Bytes from each rank (row) to each (column), of dispatch and of combine.
    fn matrices(&self) -> [Vec<Vec<usize>>; 2] {
        let n = self.comm.size();
        let mut dispatch = vec![vec![0; n]; n];
        let mut combine = dispatch.clone();
        let row = HIDDEN * self.dtype.size() + TOP_K * 8;
        for rank in 0..n {
            if self.gather {
                dispatch[rank].fill(self.tokens * row);
                combine[rank].fill(self.tokens * HIDDEN * 4);
                continue;
            }
            for t in 0..self.tokens {
                self.owners(rank, t).iter().for_each(|owner| dispatch[rank][*owner] += row);
                for id in &self.routings[rank].ids[t * TOP_K..][..TOP_K] {
                    if let Some(home) = self.map.home(*id, t) {
                        combine[home.rank][rank] += HIDDEN * 4;
                    }
                }
            }
        }
        [dispatch, combine]
    }

    /// A plain call that moves `matrix`.
    fn plain(&self, plain: &Plain, matrix: &[Vec<usize>], times: &mut Times) -> Result<()> {
        let me = self.comm.rank();
        let sent = &matrix[me];
        let received: Vec<usize> = matrix.iter().map(|row| row[me]).collect();
        let room = sent.iter().sum::<usize>().max(received.iter().sum());
        let (source, mut target) = (vec![1u8; room], vec![2u8; room]);
        times.measure(&**self.comm, || {
            plain.all_to_all_v((black_box(&source), sent), (&mut target, &received));
            black_box(&target);
            Ok(())
        })
    }
}

fn at() -> At<'static> {
    At::new("bench", Step::Setup)
}
