//! Rows that stay where they are computed with, over plain memory and threads: the order of the steps, what goes
//! where, and the same bits as on one rank.

mod small_layer;

use std::sync::Arc;

use moe_runner::comm::{At, Communicator, Kind, Step, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::exchange::resident::{ResidentWire, Room, Side, Ways, run};
use moe_runner::router::LogicalId;
use moe_runner::{Error, Result};
use small_layer::{H, K, NOWHERE, batch, expert, on_one_rank, placements};

fn at(step: Step) -> At<'static> {
    At::new("layer", step)
}

/// The steps as the kernels of a GPU take them, with loops over slices.
struct Host {
    group: Arc<dyn Communicator>,
    map: Arc<ExpertMap>,
    room: Option<Room>,
    x: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Slots, and (row, number of the rank) pairs, by rank.
    slots: Vec<usize>,
    rows: Vec<(usize, usize)>,
    counts: Vec<u32>,
    /// What stays or has arrived, and what goes: records and rows.
    here: (Vec<[u32; 2]>, Vec<f32>),
    gone: (Vec<[u32; 2]>, Vec<f32>),
    outputs: Vec<f32>,
    back: Vec<f32>,
    out: Vec<f32>,
}

impl Host {
    fn number(&self, rank: usize) -> usize {
        let all = self.group.size();
        (rank + all - self.group.rank()) % all
    }

    fn home(&self, slot: usize) -> Option<(usize, u32)> {
        let home = self.map.home(LogicalId(self.ids[slot]), slot / K)?;
        Some((self.number(home.rank), home.local.0))
    }

    /// The slots, or rows, of number d, as a range among the sorted ones.
    fn part(&self, d: usize, rows: bool) -> std::ops::Range<usize> {
        let before = |d: usize| match rows {
            true => self.rows.iter().filter(|(_, to)| *to < d).count(),
            false => self.slots.iter().filter(|slot| self.home(**slot).unwrap().0 < d).count(),
        };
        before(d)..before(d + 1)
    }

    fn exchange(
        &self,
        step: Step,
        parts: impl Fn(usize) -> Vec<f32>,
        put: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let (all, me) = (self.group.size(), self.group.rank());
        let parts: Vec<Vec<f32>> =
            (0..all).map(|peer| if peer == me { Vec::new() } else { parts(peer) }).collect();
        let counts: Vec<usize> = parts.iter().map(Vec::len).collect();
        let got = self.group.all_to_all_v(at(step), parts.concat(), &counts)?;
        let mut put = put;
        (0..all).filter(|peer| *peer != me).for_each(|peer| put(peer, got.part(peer)));
        Ok(())
    }
}

impl Side for Host {
    fn sort(&mut self) -> Result<()> {
        let all = self.group.size();
        let tokens = self.ids.len() / K;
        for d in 0..all {
            let mine: Vec<usize> =
                (0..self.ids.len()).filter(|s| self.home(*s).is_some_and(|h| h.0 == d)).collect();
            let rows = (0..tokens).filter(|t| mine.iter().any(|slot| slot / K == *t));
            self.rows.extend(rows.map(|t| (t, d)));
            self.slots.extend(mine);
        }
        Ok(())
    }

    fn share_counts(&mut self) -> Result<()> {
        let all = self.group.size();
        let mut mine = vec![0_u64; 2 * all];
        for d in 0..all {
            let rank = (self.group.rank() + d) % all;
            mine[rank] = self.part(d, false).len() as u64;
            mine[all + rank] = self.part(d, true).len() as u64;
        }
        let counts = self.group.all_gather(at(Step::Dispatch), mine)?;
        self.counts = counts.into_iter().map(|count| count as u32).collect();
        Ok(())
    }

    fn pack(&mut self) -> Result<()> {
        let all = self.group.size();
        for d in 0..all {
            let (slots, rows) = (self.part(d, false), self.part(d, true));
            let records = slots.clone().map(|p| {
                let slot = self.slots[p];
                let row = self.rows[rows.clone()].iter().position(|(t, _)| *t == slot / K);
                [self.home(slot).unwrap().1, row.unwrap() as u32]
            });
            let mut records: Vec<[u32; 2]> = records.collect();
            let mut values: Vec<f32> =
                self.rows[rows].iter().flat_map(|(t, _)| self.x[t * H..][..H].to_vec()).collect();
            if let Some(room) = self.room {
                if records.len() > room.slots || values.len() > room.rows * H {
                    return Err(Error::input("exchange", "there is no room for all slots"));
                }
                records.resize(room.slots, [NOWHERE; 2]);
                values.resize(room.rows * H, f32::NAN);
            }
            let to = if d == 0 { &mut self.here } else { &mut self.gone };
            to.0.extend(records);
            to.1.extend(values);
        }
        Ok(())
    }

    fn counts(&mut self) -> Result<Vec<u32>> {
        Ok(self.counts.clone())
    }

    fn make_room(&mut self, ways: &Ways) -> Result<()> {
        // what stays is there already, or will be
        self.here.0.reserve(ways.slots[1]);
        Ok(())
    }

    fn send(&mut self, ways: &Ways) -> Result<()> {
        self.here.0.resize(ways.slots[1], [NOWHERE; 2]);
        self.here.1.resize(ways.rows[1] * H, f32::NAN);
        let of = |peer: usize| ways.all.iter().find(|way| way.peer == peer).unwrap();
        let mut here = std::mem::take(&mut self.here);
        self.exchange(
            Step::Dispatch,
            |peer| {
                let way = of(peer);
                let records = self.gone.0[way.slots.go.clone()].iter().flatten();
                let records = records.map(|word| f32::from_bits(*word));
                let rows = &self.gone.1[way.rows.go.start * H..way.rows.go.end * H];
                records.chain(rows.iter().copied()).collect()
            },
            |peer, got| {
                let way = of(peer);
                let (records, rows) = got.split_at(2 * way.slots.come.len());
                let to = here.0[way.slots.come.clone()].iter_mut().flatten();
                to.zip(records).for_each(|(to, word)| *to = word.to_bits());
                here.1[way.rows.come.start * H..way.rows.come.end * H].copy_from_slice(rows);
            },
        )?;
        self.here = here;
        Ok(())
    }

    fn experts(&mut self, ways: &Ways) -> Result<()> {
        let (all, me) = (self.group.size(), self.group.rank());
        let count = |from: usize, rows: bool| {
            self.counts[2 * all * from + usize::from(rows) * all + me] as usize
        };
        self.outputs = vec![f32::NAN; ways.slots[1] * H];
        let (mut slot_base, mut row_base) = (0, 0);
        for d in 0..all {
            let from = (me + d) % all;
            let (slots, rows) = match self.room {
                None => (count(from, false), count(from, true)),
                Some(room) => (room.slots, room.rows),
            };
            for s in slot_base..slot_base + slots {
                let [local, row] = self.here.0[s];
                if local == NOWHERE {
                    continue;
                }
                let id = self.map.held_by(me)[local as usize].0;
                let row = &self.here.1[(row_base + row as usize) * H..][..H];
                self.outputs[s * H..][..H].copy_from_slice(&expert(id, row));
            }
            (slot_base, row_base) = (slot_base + slots, row_base + rows);
        }
        assert_eq!([slot_base, row_base], [ways.slots[1], ways.rows[1]]);
        Ok(())
    }

    fn send_back(&mut self, ways: &Ways) -> Result<()> {
        let of = |peer: usize| ways.all.iter().find(|way| way.peer == peer).unwrap();
        let mut back = vec![f32::NAN; ways.slots[0] * H];
        self.exchange(
            Step::Combine,
            |peer| {
                let come = &of(peer).slots.come;
                self.outputs[come.start * H..come.end * H].to_vec()
            },
            |peer, got| {
                let go = &of(peer).slots.go;
                back[go.start * H..go.end * H].copy_from_slice(got);
            },
        )?;
        self.back = back;
        Ok(())
    }

    fn combine(&mut self) -> Result<()> {
        self.out = vec![0.0; self.x.len()];
        for t in 0..self.ids.len() / K {
            for slot in t * K..(t + 1) * K {
                let Some((d, _)) = self.home(slot) else { continue };
                let p = self.slots.iter().position(|s| *s == slot).unwrap();
                let first = self.part(d, false).start;
                let place = match (d, self.room) {
                    (0, _) => p,
                    (_, None) => p - self.part(0, false).len(),
                    (_, Some(room)) => (d - 1) * room.slots + p - first,
                };
                let from = if d == 0 { &self.outputs } else { &self.back };
                let out = &mut self.out[t * H..][..H];
                for (out, value) in out.iter_mut().zip(&from[place * H..][..H]) {
                    *out += self.weights[slot] * value;
                }
            }
        }
        Ok(())
    }
}

fn forward(
    world: &Arc<dyn Communicator>,
    map: &Arc<ExpertMap>,
    tokens: usize,
    room: Option<Room>,
) -> Result<Vec<f32>> {
    let (x, ids, weights) = batch(world.rank(), tokens);
    let empty = || (Vec::new(), Vec::new());
    let mut host = Host {
        group: world.clone(),
        map: map.clone(),
        room,
        x,
        ids,
        weights,
        slots: Vec::new(),
        rows: Vec::new(),
        counts: Vec::new(),
        here: empty(),
        gone: empty(),
        outputs: Vec::new(),
        back: Vec::new(),
        out: Vec::new(),
    };
    let before = world.traffic().read();
    let ways = run(&mut host, (world.rank(), world.size()), room)?;
    // what crossed is what the ways say
    let wire = ResidentWire { row: H * size_of::<f32>(), output: H * size_of::<f32>() };
    let [counts, there, back] = ways.traffic(wire, world.size());
    assert_eq!(counts.is_none(), room.is_some());
    let crossed = world.traffic().read().since(&before).of(Kind::AllToAllV);
    let said = [there, back].into_iter().flatten();
    let (sent, received) = said.fold((0, 0), |(s, r), (sent, received)| (s + sent, r + received));
    assert_eq!((crossed.sent, crossed.received), (sent as u64, received as u64));
    Ok(host.out)
}

#[test]
fn wherever_experts_are_the_bits_are_those_of_one_rank() {
    for ranks in [1, 2, 3, 4] {
        for map in placements(ranks) {
            let map = &Arc::new(map);
            // ragged, and ranks without rows
            for tokens in [[5, 9, 2, 7], [0, 3, 0, 1], [1, 0, 0, 0]] {
                for room in [None, Some(Room { slots: 9 * K, rows: 9 })] {
                    run_ranks(ranks, |world| {
                        let mine = tokens[world.rank()];
                        let got = forward(world, map, mine, room)?;
                        let want = on_one_rank(&batch(world.rank(), mine));
                        assert_eq!(got, want, "{ranks} ranks, {room:?}, {map:?}");
                        Ok(())
                    })
                    .unwrap();
                }
            }
        }
    }
}

#[test]
fn what_has_no_room_is_told() {
    let map = &Arc::new(placements(2).swap_remove(2));
    let room = Some(Room { slots: 4, rows: 4 });
    let error = run_ranks(2, |world| forward(world, map, 5, room).map(drop)).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
}

#[test]
fn ways_of_two_ranks_meet() {
    // rank 0 has 3 slots of 2 rows for itself and 4 of 3 for rank 1, which has 5 of 4 for it and 6 of 5 for itself
    let counts = [3, 4, 2, 3, 5, 6, 4, 5];
    let [first, second] = [0, 1].map(|me| Ways::counted(&counts, me, 2));
    assert_eq!((first.slots, first.rows), ([4, 3 + 5], [3, 2 + 4]));
    assert_eq!((second.slots, second.rows), ([5, 6 + 4], [4, 5 + 3]));
    assert_eq!((first.all[0].slots.go.clone(), first.all[0].slots.come.clone()), (0..4, 3..8));
    assert_eq!(first.all[0].slots.go.len(), second.all[0].slots.come.len());
    assert_eq!(first.all[0].rows.come.len(), second.all[0].rows.go.len());
    let even = Room::for_share(128, 8, 4, 1.5);
    assert_eq!(even, Room { slots: 384, rows: 128 });
    // a share that is no whole number has a place for what is over
    for (tokens, ranks) in [(3, 2), (7, 3), (1, 8)] {
        let room = Room::for_share(tokens, 1, ranks, 1.0);
        assert!(
            room.slots * ranks >= tokens && room.slots <= tokens,
            "{tokens}, {ranks}: {room:?}"
        );
    }
}
