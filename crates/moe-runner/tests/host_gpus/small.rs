//! A layer small enough to see through, for exchanges over plain memory.

use moe_runner::exchange::ExpertMap;
use moe_runner::random::Random;
use moe_runner::router::LogicalId;

use super::{Compute, NOWHERE};

/// Width of rows.
pub const H: usize = 8;
/// Slots of a row.
pub const K: usize = 3;
pub const EXPERTS: usize = 7;

/// An expert that is no sum: its output says which expert saw which row.
fn expert(id: u32, row: &[f32]) -> Vec<f32> {
    row.iter().map(|v| (v * (id + 2) as f32).sin() + id as f32).collect()
}

/// The experts that a rank holds.
pub struct Held<'a>(pub &'a [LogicalId]);

impl Compute for Held<'_> {
    fn outputs(&self, slots: &[(u32, Vec<f32>)]) -> Vec<Vec<f32>> {
        slots.iter().map(|(local, row)| expert(self.0[*local as usize].0, row)).collect()
    }
}

/// Rows of one rank: their slots name every expert, one that there is not, and one expert twice.
pub fn batch(seed: usize, tokens: usize) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let random = &mut Random::new(seed as u64 + 1);
    let x = random.values(tokens * H, 1.0);
    let ids = (0..tokens * K).map(|_| (random.unit() * (EXPERTS + 1) as f64) as u32);
    let ids = ids.map(|id| if id as usize == EXPERTS { NOWHERE } else { id }).collect();
    (x, ids, random.values(tokens * K, 1.0))
}

/// What one rank with all experts returns.
pub fn on_one_rank((x, ids, weights): &(Vec<f32>, Vec<u32>, Vec<f32>)) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (slot, id) in ids.iter().enumerate().filter(|(_, id)| **id != NOWHERE) {
        let t = slot / K;
        let y = expert(*id, &x[t * H..][..H]);
        for (out, y) in out[t * H..][..H].iter_mut().zip(y) {
            *out += weights[slot] * y;
        }
    }
    out
}

/// Experts dealt to the ranks, with copies, and all on one rank.
pub fn placements(ranks: usize) -> Vec<ExpertMap> {
    let ids = |ids: &mut dyn Iterator<Item = usize>| -> Vec<LogicalId> {
        ids.map(|id| LogicalId(id as u32)).collect()
    };
    let dealt: Vec<Vec<LogicalId>> =
        (0..ranks).map(|r| ids(&mut (0..EXPERTS).filter(|e| e % ranks == r))).collect();
    // copies: every rank has experts 0 and 1, too; and a rank that has all, another none but those
    let mut copied = dealt.clone();
    for held in &mut copied {
        for id in [LogicalId(0), LogicalId(1)] {
            if !held.contains(&id) {
                held.push(id);
            }
        }
    }
    let mut one = vec![Vec::new(); ranks];
    one[ranks - 1] = ids(&mut (0..EXPERTS).rev());
    [dealt, copied, one].iter().map(|held| ExpertMap::new(EXPERTS, held).unwrap()).collect()
}
