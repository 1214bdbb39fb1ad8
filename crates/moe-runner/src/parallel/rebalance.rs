//! Moving experts between ranks, from one placement to another, between two forward passes: as they are stored, for
//! kernels that pack them anew. What goes where is [`moves`](crate::exchange::moves)'.

pub use crate::exchange::moves::{Transfer, transfers};

use crate::comm::{At, Communicator, Step};
use crate::exchange::ExpertMap;
use crate::exchange::moves::{Moves, Shelf, carry};
use crate::router::LocalId;
use crate::weights::Expert;
use crate::{Error, Result};

/// The experts of this rank under `new`, in the order of `new`, from its experts `mine` under
/// `old`. Those that stay share their memory; the others come from other ranks, bit by bit the
/// same. All ranks of `group`, whose ranks the maps number, call this together, for the same layer.
///
/// # Errors
/// As [`transfers`]; if `mine` are not as many as `old` says, on any rank; a rank that does not
/// arrive. Every rank of the group then fails.
pub fn move_experts(
    group: &dyn Communicator,
    layer: &str,
    (old, new): (&ExpertMap, &ExpertMap),
    mine: &[Expert],
) -> Result<Vec<Expert>> {
    let moved = carried(group, layer, (old, new), mine);
    if let Err(error) = &moved {
        // the others must not wait for this rank, nor go on with a placement that it does not have
        group.abort(&format!("layer '{layer}': {error}"));
    }
    moved
}

fn carried(
    group: &dyn Communicator,
    layer: &str,
    (old, new): (&ExpertMap, &ExpertMap),
    mine: &[Expert],
) -> Result<Vec<Expert>> {
    let rank = group.rank();
    let moves = Moves::new(old, new, rank.min(old.ranks() - 1))?;
    if old.ranks() != group.size() || mine.len() != old.held_by(rank).len() {
        return Err(Error::input(
            "expert placement",
            format!(
                "{} experts on rank {rank} of {}; the placement is for {} ranks of {}",
                mine.len(),
                group.size(),
                old.ranks(),
                old.held_by(0).len()
            ),
        ));
    }
    let mut shelf = Stored { group, at: At::new(layer, Step::MoveWeights), mine, new: Vec::new() };
    carry(&mut shelf, &moves)?;
    let all = shelf.new.into_iter().collect::<Option<Vec<_>>>();
    all.ok_or_else(|| Error::input("expert placement", "an expert did not arrive"))
}

/// Experts of the host.
struct Stored<'a> {
    group: &'a dyn Communicator,
    at: At<'a>,
    mine: &'a [Expert],
    new: Vec<Option<Expert>>,
}

impl Shelf for Stored<'_> {
    fn make_room(&mut self, places: usize) -> Result<()> {
        self.new = vec![None; places];
        Ok(())
    }

    fn keep(&mut self, from: LocalId, to: LocalId) -> Result<()> {
        self.new[to.index()] = Some(self.mine[from.index()].clone());
        Ok(())
    }

    /// For each expert the number of bytes, then them.
    fn exchange(&mut self, moves: &Moves) -> Result<()> {
        let (mut data, mut counts) = (Vec::new(), vec![0; self.group.size()]);
        for (to, count) in counts.iter_mut().enumerate() {
            let start = data.len();
            for (_, at) in moves.send.iter().filter(|(rank, _)| *rank == to) {
                let bytes = self.mine[at.index()].to_bytes();
                data.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
                data.extend_from_slice(&bytes);
            }
            *count = data.len() - start;
        }
        let received = self.group.all_to_all_v(self.at, data, &counts)?;
        for (from, mut part) in received.iter().enumerate() {
            let short = || {
                let reason = format!("rank {from} sent fewer experts than agreed");
                Error::input("expert weights", reason)
            };
            for (_, to) in moves.receive.iter().filter(|(rank, _)| *rank == from) {
                let (len, rest) = part.split_first_chunk().ok_or_else(short)?;
                let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| short())?;
                let (bytes, rest) = rest.split_at_checked(len).ok_or_else(short)?;
                self.new[to.index()] = Some(Expert::from_bytes(bytes)?);
                part = rest;
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: LocalId, to: LocalId) -> Result<()> {
        self.new[to.index()] = self.new[from.index()].clone();
        Ok(())
    }
}
