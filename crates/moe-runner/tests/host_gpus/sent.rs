//! Ranks that send and receive, as by NCCL.

use std::ops::Range;
use std::sync::Arc;

use moe_runner::comm::{At, Step};
use moe_runner::exchange::resident::{Room, Side, Ways};
use moe_runner::{Error, Result};

use super::put::Before;
use super::{Compute, NOWHERE, Own};

/// The steps as the kernels of a GPU take them.
pub struct Sent<'a> {
    /// Each micro-batch has memory of its own.
    lanes: Vec<Lane<'a>>,
    /// Counts the slots of each expert, where there is something to count in.
    pub load: Option<&'a mut Vec<u64>>,
    /// Asked before every step.
    pub before: Before,
}

/// One micro-batch.
struct Lane<'a> {
    own: Own<'a>,
    experts: &'a dyn Compute,
    room: Option<Room>,
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

fn at(step: Step) -> At<'static> {
    At::new("model.layers.0.mlp", step)
}

impl<'a> Sent<'a> {
    pub fn new(own: Own<'a>, experts: &'a dyn Compute, room: Option<Room>, lanes: usize) -> Self {
        let lanes = (0..lanes).map(|lane| Lane::new(own.lane(lane, lanes), experts, room));
        Self { lanes: lanes.collect(), load: None, before: Arc::new(|_, _| Ok(())) }
    }

    /// The sums of all rows.
    pub fn out(&self) -> Vec<f32> {
        self.lanes.iter().flat_map(|lane| lane.out.iter().copied()).collect()
    }

    fn step(&mut self, what: &'static str, lane: usize) -> Result<&mut Lane<'a>> {
        (self.before)(what, lane)?;
        Ok(&mut self.lanes[lane])
    }
}

impl Side for Sent<'_> {
    fn sort(&mut self, lane: usize) -> Result<()> {
        let of = &mut self.lanes[lane];
        of.sort()?;
        if let Some(load) = &mut self.load {
            of.slots.iter().for_each(|slot| load[of.own.ids[*slot] as usize] += 1);
        }
        Ok(())
    }

    fn share_counts(&mut self, lane: usize) -> Result<()> {
        self.lanes[lane].share_counts()
    }

    fn pack(&mut self, lane: usize) -> Result<()> {
        self.lanes[lane].pack()
    }

    fn counts(&mut self, lane: usize) -> Result<Vec<u32>> {
        Ok(self.lanes[lane].counts.clone())
    }

    fn make_room(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        // what stays is there already, or will be
        self.lanes[lane].here.0.reserve(ways.slots[1]);
        Ok(())
    }

    fn send(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        self.step("dispatch", lane)?.send(ways)
    }

    fn experts(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        self.step("experts", lane)?.experts(ways)
    }

    fn send_back(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        self.step("wait for combine", lane)?.send_back(ways)
    }

    fn combine(&mut self, lane: usize) -> Result<()> {
        self.step("combine", lane)?.combine()
    }
}

impl<'a> Lane<'a> {
    fn new(own: Own<'a>, experts: &'a dyn Compute, room: Option<Room>) -> Self {
        let empty = || (Vec::new(), Vec::new());
        Self {
            own,
            experts,
            room,
            slots: Vec::new(),
            rows: Vec::new(),
            counts: Vec::new(),
            here: empty(),
            gone: empty(),
            outputs: Vec::new(),
            back: Vec::new(),
            out: Vec::new(),
        }
    }

    fn number(&self, rank: usize) -> usize {
        let all = self.own.group.size();
        (rank + all - self.own.group.rank()) % all
    }

    fn home(&self, slot: usize) -> Option<(usize, u32)> {
        self.own.home(slot).map(|(rank, local)| (self.number(rank), local))
    }

    /// The slots, or rows, of number d, as a range among the sorted ones.
    fn part(&self, d: usize, rows: bool) -> Range<usize> {
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
        let (all, me) = (self.own.group.size(), self.own.group.rank());
        let parts: Vec<Vec<f32>> =
            (0..all).map(|peer| if peer == me { Vec::new() } else { parts(peer) }).collect();
        let counts: Vec<usize> = parts.iter().map(Vec::len).collect();
        let got = self.own.group.all_to_all_v(at(step), parts.concat(), &counts)?;
        let mut put = put;
        (0..all).filter(|peer| *peer != me).for_each(|peer| put(peer, got.part(peer)));
        Ok(())
    }

    fn sort(&mut self) -> Result<()> {
        let (all, k) = (self.own.group.size(), self.own.top_k);
        for d in 0..all {
            let mine: Vec<usize> = (0..self.own.ids.len())
                .filter(|s| self.home(*s).is_some_and(|h| h.0 == d))
                .collect();
            let rows = (0..self.own.tokens()).filter(|t| mine.iter().any(|slot| slot / k == *t));
            self.rows.extend(rows.map(|t| (t, d)));
            self.slots.extend(mine);
        }
        Ok(())
    }

    fn share_counts(&mut self) -> Result<()> {
        let all = self.own.group.size();
        let mut mine = vec![0_u32; 2 * all];
        for d in 0..all {
            let rank = (self.own.group.rank() + d) % all;
            mine[rank] = self.part(d, false).len() as u32;
            mine[all + rank] = self.part(d, true).len() as u32;
        }
        self.counts = self.own.group.all_gather(at(Step::Dispatch), mine)?;
        Ok(())
    }

    fn pack(&mut self) -> Result<()> {
        let (k, width) = (self.own.top_k, self.own.width);
        for d in 0..self.own.group.size() {
            let (slots, rows) = (self.part(d, false), self.part(d, true));
            let records = slots.clone().map(|p| {
                let slot = self.slots[p];
                let row = self.rows[rows.clone()].iter().position(|(t, _)| *t == slot / k);
                [self.home(slot).unwrap().1, row.unwrap() as u32]
            });
            let mut records: Vec<[u32; 2]> = records.collect();
            let mut values: Vec<f32> =
                self.rows[rows].iter().flat_map(|(t, _)| self.own.row(*t).to_vec()).collect();
            if let Some(room) = self.room {
                if records.len() > room.slots || values.len() > room.rows * width {
                    return Err(Error::input("exchange", "there is no room for all slots"));
                }
                records.resize(room.slots, [NOWHERE; 2]);
                values.resize(room.rows * width, f32::NAN);
            }
            let to = if d == 0 { &mut self.here } else { &mut self.gone };
            to.0.extend(records);
            to.1.extend(values);
        }
        Ok(())
    }

    fn send(&mut self, ways: &Ways) -> Result<()> {
        let width = self.own.width;
        self.here.0.resize(ways.slots[1], [NOWHERE; 2]);
        self.here.1.resize(ways.rows[1] * width, f32::NAN);
        let of = |peer: usize| ways.all.iter().find(|way| way.peer == peer).unwrap();
        let mut here = std::mem::take(&mut self.here);
        self.exchange(
            Step::Dispatch,
            |peer| {
                let way = of(peer);
                let records = self.gone.0[way.slots.go.clone()].iter().flatten();
                let records = records.map(|word| f32::from_bits(*word));
                let rows = &self.gone.1[way.rows.go.start * width..way.rows.go.end * width];
                records.chain(rows.iter().copied()).collect()
            },
            |peer, got| {
                let way = of(peer);
                let (records, rows) = got.split_at(2 * way.slots.come.len());
                let to = here.0[way.slots.come.clone()].iter_mut().flatten();
                to.zip(records).for_each(|(to, word)| *to = word.to_bits());
                here.1[way.rows.come.start * width..way.rows.come.end * width]
                    .copy_from_slice(rows);
            },
        )?;
        self.here = here;
        Ok(())
    }

    fn experts(&mut self, ways: &Ways) -> Result<()> {
        let (all, me, width) = (self.own.group.size(), self.own.group.rank(), self.own.width);
        let count = |from: usize, rows: bool| {
            self.counts[2 * all * from + usize::from(rows) * all + me] as usize
        };
        let (mut slot_base, mut row_base) = (0, 0);
        let (mut places, mut slots) = (Vec::new(), Vec::new());
        for d in 0..all {
            let from = (me + d) % all;
            let (of_slots, of_rows) = match self.room {
                None => (count(from, false), count(from, true)),
                Some(room) => (room.slots, room.rows),
            };
            for s in slot_base..slot_base + of_slots {
                let [local, row] = self.here.0[s];
                if local != NOWHERE {
                    let row = &self.here.1[(row_base + row as usize) * width..][..width];
                    places.push(s);
                    slots.push((local, row.to_vec()));
                }
            }
            (slot_base, row_base) = (slot_base + of_slots, row_base + of_rows);
        }
        assert_eq!([slot_base, row_base], [ways.slots[1], ways.rows[1]]);
        self.outputs = vec![f32::NAN; ways.slots[1] * width];
        for (s, output) in places.into_iter().zip(self.experts.outputs(&slots)) {
            self.outputs[s * width..][..width].copy_from_slice(&output);
        }
        Ok(())
    }

    fn send_back(&mut self, ways: &Ways) -> Result<()> {
        let width = self.own.width;
        let of = |peer: usize| ways.all.iter().find(|way| way.peer == peer).unwrap();
        let mut back = vec![f32::NAN; ways.slots[0] * width];
        self.exchange(
            Step::Combine,
            |peer| {
                let come = &of(peer).slots.come;
                self.outputs[come.start * width..come.end * width].to_vec()
            },
            |peer, got| {
                let go = &of(peer).slots.go;
                back[go.start * width..go.end * width].copy_from_slice(got);
            },
        )?;
        self.back = back;
        Ok(())
    }

    fn combine(&mut self) -> Result<()> {
        let width = self.own.width;
        self.out = self.own.sums(|slot| {
            let (d, _) = self.home(slot)?;
            let p = self.slots.iter().position(|s| *s == slot)?;
            let first = self.part(d, false).start;
            let place = match (d, self.room) {
                (0, _) => p,
                (_, None) => p - self.part(0, false).len(),
                (_, Some(room)) => (d - 1) * room.slots + p - first,
            };
            let from = if d == 0 { &self.outputs } else { &self.back };
            Some(&from[place * width..][..width])
        });
        Ok(())
    }
}
