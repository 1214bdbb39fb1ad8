//! Ranks that write into each other's memory.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use moe_runner::Result;
use moe_runner::comm::watch::{Awaited, Watch};
use moe_runner::comm::{At, Step};
use moe_runner::exchange::one_sided::{Meeting, Places, Side, Signals};
use moe_runner::exchange::resident::ResidentWire;
use moe_runner::experts::DeviceSpan;

use super::{Compute, NOWHERE, Own};

/// What others write on one rank, for one micro-batch. Words are atomic so that a rank that comes too early is seen by its
/// numbers, and is no undefined behaviour; only the signals order anything.
pub struct Memory {
    rows: Vec<AtomicU32>,
    ids: Vec<AtomicU32>,
    outputs: Vec<AtomicU32>,
    signals: Vec<AtomicU32>,
}

/// By rank, and by micro-batch.
pub type All = Vec<Vec<Memory>>;

impl Memory {
    /// Of all ranks, for batches of up to `most` rows.
    pub fn all(ranks: usize, lanes: usize, most: usize, (width, top_k): (usize, usize)) -> All {
        let words = |len: usize| (0..len).map(|_| AtomicU32::new(f32::NAN.to_bits())).collect();
        let of = |_| Self {
            rows: words(ranks * most * width),
            ids: words(ranks * most * top_k),
            outputs: words(most * top_k * width),
            signals: (0..Signals { ranks }.words()).map(|_| AtomicU32::new(0)).collect(),
        };
        (0..ranks).map(|_| (0..lanes).map(of).collect()).collect()
    }

    fn signals(&self) -> Vec<u32> {
        self.signals.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }
}

fn put(to: &[AtomicU32], values: &[f32]) {
    to.iter().zip(values).for_each(|(to, v)| to.store(v.to_bits(), Ordering::Relaxed));
}

fn get(from: &[AtomicU32]) -> Vec<f32> {
    from.iter().map(|v| f32::from_bits(v.load(Ordering::Relaxed))).collect()
}

/// Asked before a step of a micro-batch.
pub type Before = Arc<dyn Fn(&'static str, usize) -> Result<()> + Send + Sync>;

/// How ranks wait, and who is asked before every step.
#[derive(Clone)]
pub struct Waits {
    /// How long for each other.
    pub timeout: Duration,
    /// Layers of the model, and the number of this one.
    pub layers: &'static [&'static str],
    pub layer: usize,
    pub before: Before,
    /// Rows of the rank with most of them, where all know it, as in a graph; else ranks tell each other.
    pub most: Option<usize>,
}

impl Default for Waits {
    fn default() -> Self {
        let (timeout, before) = (Duration::from_secs(60), Arc::new(|_: &'static str, _| Ok(())));
        Self { timeout, layers: &["model.layers.0.mlp"], layer: 0, before, most: None }
    }
}

/// The steps as the kernels of a GPU take them.
pub struct Put<'a> {
    pub own: Own<'a>,
    pub experts: &'a dyn Compute,
    pub all: &'a All,
    pub lanes: usize,
    pub waits: Waits,
    /// Counts the slots of each expert, where there is something to count in.
    pub load: Option<&'a mut Vec<u64>>,
    pub out: Vec<f32>,
    /// Bytes to and from others: there, and back.
    pub moved: [(usize, usize); 2],
    pub spans: Mutex<Vec<DeviceSpan>>,
    pub begin: Instant,
}

impl<'a> Put<'a> {
    pub fn new(own: Own<'a>, experts: &'a dyn Compute, all: &'a All) -> Self {
        Self {
            own,
            experts,
            all,
            lanes: 1,
            waits: Waits::default(),
            load: None,
            out: vec![f32::NAN; own.x.len()],
            moved: [(0, 0); 2],
            spans: Mutex::default(),
            begin: Instant::now(),
        }
    }

    fn me(&self) -> usize {
        self.own.group.rank()
    }

    /// The rank with number d.
    fn rank(&self, d: usize) -> usize {
        (self.me() + d) % self.own.group.size()
    }

    fn step<R>(
        &mut self,
        what: &'static str,
        lane: usize,
        work: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        (self.waits.before)(what, lane)?;
        let start = self.begin.elapsed();
        let done = work(self)?;
        let end = self.begin.elapsed();
        self.spans.lock().unwrap().push(DeviceSpan { what, lane: Some(lane), start, end });
        Ok(done)
    }

    fn layer(&self) -> &'static str {
        self.waits.layers[self.waits.layer]
    }
}

impl Side for Put<'_> {
    fn agree(&mut self) -> Result<Places> {
        let (ranks, top_k) = (self.own.group.size(), self.own.top_k);
        let most = match self.waits.most {
            Some(most) => most,
            None => {
                let mine = [self.own.tokens() as u64];
                let at = At::new(self.layer(), Step::Dispatch);
                let all = self.own.group.all_gather(at, mine)?;
                all.into_iter().max().unwrap_or(0) as usize
            }
        };
        Ok(Places { ranks, most, top_k })
    }

    fn make_room(&mut self, lanes: &[Places]) -> Result<()> {
        let (width, memory) = (self.own.width, &self.all[self.me()]);
        assert!(lanes.len() <= memory.len());
        assert!(lanes[0].rows() * width <= memory[0].rows.len());
        Ok(())
    }

    fn put_rows(&mut self, lane: usize, places: Places) -> Result<()> {
        let own = self.own.lane(lane, self.lanes);
        let (k, width) = (own.top_k, own.width);
        self.step("dispatch", lane, |side| {
            for d in 0..places.ranks {
                let (rank, mine) = (side.rank(d), places.number_at(d));
                let there = &side.all[rank][lane];
                for t in 0..places.most {
                    let row = places.row(mine, t);
                    let homes = (t * k..(t + 1) * k).map(|slot| own.home(slot));
                    let here = |home: Option<(usize, u32)>| home.filter(|home| home.0 == rank);
                    let locals: Vec<u32> =
                        homes.map(|home| here(home).map_or(NOWHERE, |home| home.1)).collect();
                    for (to, local) in there.ids[row * k..].iter().zip(&locals) {
                        to.store(*local, Ordering::Relaxed);
                    }
                    let wanted = locals.iter().any(|local| *local != NOWHERE);
                    if wanted {
                        put(&there.rows[row * width..][..width], own.row(t));
                    }
                    if d > 0 {
                        side.moved[0].0 +=
                            if wanted { width * 4 } else { 0 } + k * ResidentWire::ID;
                    }
                }
            }
            if let Some(load) = &mut side.load {
                let ids = own.ids.iter().filter_map(|id| usize::try_from(*id).ok());
                ids.filter(|id| *id < own.map.experts()).for_each(|id| load[id] += 1);
            }
            Ok(())
        })
    }

    fn meet(&mut self, lane: usize, meeting: Meeting) -> Result<()> {
        let what = match meeting {
            Meeting::Rows => "wait for dispatch",
            Meeting::Outputs => "wait for combine",
        };
        self.step(what, lane, |side| {
            let (me, ranks) = (side.me(), side.own.group.size());
            let signals = Signals { ranks };
            let mine = &side.all[me][lane];
            let layer = side.waits.layer as u32;
            mine.signals[signals.layer(meeting, 0)].store(layer, Ordering::Relaxed);
            let now = mine.signals[signals.count(meeting, 0)].load(Ordering::Relaxed) + 1;
            mine.signals[signals.count(meeting, 0)].store(now, Ordering::Relaxed);
            for d in 1..ranks {
                // this rank's number there
                let (there, number) = (&side.all[side.rank(d)][lane].signals, ranks - d);
                there[signals.layer(meeting, number)].store(layer, Ordering::Relaxed);
                there[signals.count(meeting, number)].store(now, Ordering::Release);
            }
            let at = At::new(side.layer(), meeting.step());
            let watch = Watch { group: &**side.own.group, timeout: side.waits.timeout, at };
            let here = |d: usize| mine.signals[signals.count(meeting, d)].load(Ordering::Acquire);
            let name = |(meeting, layer): (Meeting, u32)| {
                (side.waits.layers[layer as usize].to_owned(), meeting.step())
            };
            watch.until(
                || Ok::<_, moe_runner::Error>((1..ranks).all(|d| here(d) >= now)),
                || {
                    let late = signals.late(&mine.signals())?;
                    let (rank, seen) = (side.rank(late.number), late.seen.map(name));
                    Some(Awaited { rank, at: name(late.at), seen })
                },
            )
        })
    }

    fn experts(&mut self, lane: usize, places: Places) -> Result<()> {
        let (k, width) = (self.own.top_k, self.own.width);
        self.step("experts", lane, |side| {
            let here = &side.all[side.me()][lane];
            let ids = here.ids[..places.slots()].iter().map(|id| id.load(Ordering::Relaxed));
            let arrived: Vec<(usize, u32)> =
                ids.enumerate().filter(|(_, id)| *id != NOWHERE).collect();
            let mut rows: Vec<usize> = arrived.iter().map(|(place, _)| place / k).collect();
            rows.dedup();
            let far = rows.iter().filter(|row| **row >= places.most).count();
            let told = places.slots() - places.most * k;
            side.moved[0].1 += far * width * 4 + told * ResidentWire::ID;
            let slots: Vec<(u32, Vec<f32>)> = arrived
                .iter()
                .map(|(place, local)| (*local, get(&here.rows[place / k * width..][..width])))
                .collect();
            for ((place, _), output) in arrived.iter().zip(side.experts.outputs(&slots)) {
                let (d, slot) = places.home(*place);
                put(&side.all[side.rank(d)][lane].outputs[slot * width..][..width], &output);
                side.moved[1].0 += if d > 0 { width * 4 } else { 0 };
            }
            Ok(())
        })
    }

    fn combine(&mut self, lane: usize, _: Places) -> Result<()> {
        let rows = self.own.lane_rows(lane, self.lanes);
        let own = self.own.part(rows.clone());
        self.step("combine", lane, |side| {
            let outputs = get(&side.all[side.me()][lane].outputs);
            let (me, width) = (side.me(), own.width);
            let far = |slot: &usize| own.home(*slot).is_some_and(|home| home.0 != me);
            side.moved[1].1 += (0..own.ids.len()).filter(far).count() * width * 4;
            let output = |slot: usize| own.home(slot).map(|_| &outputs[slot * width..][..width]);
            side.out[rows.start * width..rows.end * width].copy_from_slice(&own.sums(output));
            Ok(())
        })
    }
}
