//! Ranks that write into each other's memory, over plain memory and threads: the order of the steps, where rows, slots
//! and outputs lie, that two meetings a pass are enough, and the same bits as on one rank.

mod small_layer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use moe_runner::Result;
use moe_runner::comm::{At, Communicator, Step, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::exchange::one_sided::{Meeting, Places, Side, run};
use moe_runner::exchange::resident::{ResidentWire, Ways};
use moe_runner::router::LogicalId;
use small_layer::{H, K, NOWHERE, batch, expert, on_one_rank, placements};

const MOST: usize = 9;

/// What others write on one rank. Words are atomic so that a rank that comes too early is seen by its numbers, and is no
/// undefined behaviour; only the signals order anything.
struct Memory {
    rows: Vec<AtomicU32>,
    ids: Vec<AtomicU32>,
    outputs: Vec<AtomicU32>,
    /// `[2, R]`: how often each rank has come to either meeting.
    signals: Vec<AtomicU32>,
}

impl Memory {
    fn new(ranks: usize) -> Self {
        let words = |len: usize| (0..len).map(|_| AtomicU32::new(f32::NAN.to_bits())).collect();
        Self {
            rows: words(ranks * MOST * H),
            ids: words(ranks * MOST * K),
            outputs: words(MOST * K * H),
            signals: (0..2 * ranks).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

fn put(to: &[AtomicU32], values: &[f32]) {
    to.iter().zip(values).for_each(|(to, v)| to.store(v.to_bits(), Ordering::Relaxed));
}

fn get(from: &[AtomicU32]) -> Vec<f32> {
    from.iter().map(|v| f32::from_bits(v.load(Ordering::Relaxed))).collect()
}

/// The steps as the kernels of a GPU take them.
struct Host<'a> {
    group: &'a Arc<dyn Communicator>,
    map: &'a ExpertMap,
    all: &'a [Memory],
    /// Rows of the rank with most of them.
    most: usize,
    /// How often this rank has come to either meeting.
    met: &'a mut [u32; 2],
    x: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    out: Vec<f32>,
    /// Bytes to others: there, and back.
    sent: [usize; 2],
}

impl Host<'_> {
    fn me(&self) -> usize {
        self.group.rank()
    }

    /// The rank with number d.
    fn rank(&self, d: usize) -> usize {
        (self.me() + d) % self.group.size()
    }

    fn home(&self, slot: usize) -> Option<(usize, u32)> {
        let home = self.map.home(LogicalId(*self.ids.get(slot)?), slot / K)?;
        Some((home.rank, home.local.0))
    }
}

impl Side for Host<'_> {
    fn agree(&mut self) -> Result<Places> {
        // known to all, so that nobody waits here
        Ok(Places { ranks: self.group.size(), most: self.most, top_k: K })
    }

    fn make_room(&mut self, places: Places) -> Result<()> {
        assert!(places.most <= MOST && places.ranks == self.all.len());
        Ok(())
    }

    fn put_rows(&mut self, places: Places) -> Result<()> {
        for d in 0..places.ranks {
            let (rank, mine) = (self.rank(d), places.number_at(d));
            let there = &self.all[rank];
            for t in 0..places.most {
                let row = places.row(mine, t);
                let homes = (t * K..(t + 1) * K).map(|slot| self.home(slot));
                let locals: Vec<u32> = homes
                    .map(|home| home.filter(|home| home.0 == rank).map_or(NOWHERE, |home| home.1))
                    .collect();
                for (to, local) in there.ids[row * K..].iter().zip(&locals) {
                    to.store(*local, Ordering::Relaxed);
                }
                let wanted = locals.iter().any(|local| *local != NOWHERE);
                if wanted {
                    put(&there.rows[row * H..][..H], &self.x[t * H..][..H]);
                }
                if d > 0 {
                    self.sent[0] += if wanted { H * 4 } else { 0 } + K * ResidentWire::ID;
                }
            }
        }
        Ok(())
    }

    fn meet(&mut self, meeting: Meeting) -> Result<()> {
        let which = meeting as usize;
        self.met[which] += 1;
        let (me, ranks) = (self.me(), self.all.len());
        for there in self.all {
            there.signals[which * ranks + me].store(self.met[which], Ordering::Release);
        }
        for signal in &self.all[me].signals[which * ranks..(which + 1) * ranks] {
            while signal.load(Ordering::Acquire) < self.met[which] {
                self.group.check()?;
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    fn experts(&mut self, places: Places) -> Result<()> {
        let here = &self.all[self.me()];
        for place in 0..places.slots() {
            let local = here.ids[place].load(Ordering::Relaxed);
            if local == NOWHERE {
                continue;
            }
            let id = self.map.held_by(self.me())[local as usize].0;
            let row = get(&here.rows[place / K * H..][..H]);
            let (d, slot) = places.home(place);
            put(&self.all[self.rank(d)].outputs[slot * H..][..H], &expert(id, &row));
            self.sent[1] += if d > 0 { H * 4 } else { 0 };
        }
        Ok(())
    }

    fn combine(&mut self, _: Places) -> Result<()> {
        self.out = vec![0.0; self.x.len()];
        for slot in 0..self.ids.len() {
            if self.home(slot).is_none() {
                continue;
            }
            let output = get(&self.all[self.me()].outputs[slot * H..][..H]);
            for (out, value) in self.out[slot / K * H..][..H].iter_mut().zip(output) {
                *out += self.weights[slot] * value;
            }
        }
        Ok(())
    }
}

/// Passes one after another, of any sizes, with nothing between them but the meetings: a rank that is early must not
/// touch what another one still reads.
#[test]
fn passes_that_follow_one_another_give_the_bits_of_one_rank() {
    let passes = [[5, 9, 2, 7], [0, 3, 0, 1], [1, 0, 0, 0], [0; 4], [9, 9, 9, 9], [4, 1, 8, 2]];
    for ranks in [1, 2, 3, 4] {
        for map in placements(ranks) {
            let all: Vec<Memory> = (0..ranks).map(|_| Memory::new(ranks)).collect();
            run_ranks(ranks, |group| {
                let (me, mut met) = (group.rank(), [0; 2]);
                for (pass, tokens) in passes.iter().cycle().take(10 * passes.len()).enumerate() {
                    let of = batch(pass * ranks + me, tokens[me]);
                    let (x, ids, weights) = of.clone();
                    let mut host = Host {
                        group,
                        map: &map,
                        all: &all,
                        most: *tokens[..ranks].iter().max().unwrap(),
                        met: &mut met,
                        x,
                        ids,
                        weights,
                        out: Vec::new(),
                        sent: [0; 2],
                    };
                    let places = run(&mut host)?;
                    assert_eq!(host.out, on_one_rank(&of), "pass {pass} of {ranks} ranks, {map:?}");
                    let sent = host.sent;
                    if pass < passes.len() {
                        counted(group, &map, places, &of.1, sent)?;
                    }
                }
                Ok(())
            })
            .unwrap();
        }
    }
}

/// The bytes that a rank put are those that are predicted from counts.
fn counted(
    group: &Arc<dyn Communicator>,
    map: &ExpertMap,
    places: Places,
    ids: &[u32],
    sent: [usize; 2],
) -> Result<()> {
    let ranks = group.size();
    let mut line = vec![0_u64; 2 * ranks];
    for (t, row) in ids.chunks_exact(K).enumerate() {
        let to: Vec<usize> =
            row.iter().filter_map(|id| Some(map.home(LogicalId(*id), t)?.rank)).collect();
        for rank in 0..ranks {
            let slots = to.iter().filter(|to| **to == rank).count() as u64;
            line[rank] += slots;
            line[ranks + rank] += u64::from(slots > 0);
        }
    }
    let all = group.all_gather(At::new("layer", Step::Setup), line)?;
    let counts: Vec<u32> = all.into_iter().map(|count| count as u32).collect();
    let ways = Ways::counted(&counts, group.rank(), ranks);
    let wire = ResidentWire { row: H * 4, output: H * 4 };
    let [there, back] = places.traffic(&ways, wire);
    assert_eq!(sent, [there.0, back.0]);
    Ok(())
}

#[test]
fn places_of_two_ranks_meet() {
    let places = Places { ranks: 3, most: 5, top_k: 2 };
    assert_eq!((places.rows(), places.slots()), (15, 30));
    // row 4 of the rank after this one, and its second slot
    assert_eq!(places.row(1, 4), 9);
    assert_eq!(places.home(9 * 2 + 1), (1, 4 * 2 + 1));
    // who is number 1 here has this rank as number 2
    assert_eq!([0, 1, 2].map(|d| places.number_at(d)), [0, 2, 1]);
}
