//! Moving experts between ranks, from one placement to another, between two forward passes.
//!
//! Which rank sends which expert where follows from the two placements alone, so that every rank
//! knows it without asking. An expert that a rank holds already is kept there; for each other one
//! the ranks that need it are divided evenly among those that have it.

use crate::comm::{At, Communicator, Received, Step};
use crate::exchange::ExpertMap;
use crate::router::LogicalId;
use crate::weights::Expert;
use crate::{Error, Result};

/// One expert's way from a rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The expert.
    pub expert: LogicalId,
    /// A rank that has it.
    pub from: usize,
    /// A rank that will.
    pub to: usize,
}

/// What must move from `old` to `new`, by expert, then by sender. No rank gets an expert that it has,
/// or the same one twice. Of n ranks that need an expert which m ranks have, the first n div m go
/// to the first of those, and so on; what is left over goes to the first ones, one each.
///
/// # Errors
/// If the two do not place the same experts on the same number of ranks.
pub fn transfers(old: &ExpertMap, new: &ExpertMap) -> Result<Vec<Transfer>> {
    if (old.experts(), old.ranks()) != (new.experts(), new.ranks()) {
        return Err(Error::input(
            "expert placement",
            format!(
                "{} experts on {} ranks cannot become {} on {}",
                old.experts(),
                old.ranks(),
                new.experts(),
                new.ranks()
            ),
        ));
    }
    let mut all = Vec::new();
    for id in (0..old.experts() as u32).map(LogicalId) {
        let owners = ranks_with(old, id);
        let needing: Vec<usize> =
            ranks_with(new, id).into_iter().filter(|rank| !owners.contains(rank)).collect();
        let (each, shared) = (needing.len() / owners.len(), needing.len() % owners.len());
        let (even, left) = needing.split_at(needing.len() - shared);
        for (i, from) in owners.iter().enumerate() {
            let to = even[i * each..(i + 1) * each].iter().chain(left.get(i));
            all.extend(to.map(|to| Transfer { expert: id, from: *from, to: *to }));
        }
    }
    Ok(all)
}

/// The ranks that hold an expert, each once, in order.
fn ranks_with(map: &ExpertMap, id: LogicalId) -> Vec<usize> {
    let mut ranks: Vec<usize> = map.copies(id).iter().map(|home| home.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

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
    let moved = exchange(group, layer, (old, new), mine);
    if let Err(error) = &moved {
        // the others must not wait for this rank, nor go on with a placement that it does not have
        group.abort(&format!("layer '{layer}': {error}"));
    }
    moved
}

fn exchange(
    group: &dyn Communicator,
    layer: &str,
    (old, new): (&ExpertMap, &ExpertMap),
    mine: &[Expert],
) -> Result<Vec<Expert>> {
    let rank = group.rank();
    let transfers = transfers(old, new)?;
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
    let (send, counts) = parts(&transfers, (old.held_by(rank), mine), rank, group.size());
    let received = group.all_to_all_v(At::new(layer, Step::MoveWeights), send, &counts)?;
    let mut experts = read(&transfers, &received, rank)?;
    experts.extend(old.held_by(rank).iter().copied().zip(mine.iter().cloned()));
    let of = |id: &LogicalId| experts.iter().find(|(held, _)| held == id);
    let all = new.held_by(rank).iter().map(of).collect::<Option<Vec<_>>>();
    all.map(|all| all.into_iter().map(|(_, expert)| expert.clone()).collect())
        .ok_or_else(|| Error::input("expert placement", "an expert did not arrive"))
}

/// What this rank, which holds `ids`, sends to each (for each expert the number of bytes, then
/// them), and how many bytes each gets.
fn parts(
    transfers: &[Transfer],
    (ids, experts): (&[LogicalId], &[Expert]),
    rank: usize,
    ranks: usize,
) -> (Vec<u8>, Vec<usize>) {
    let (mut data, mut counts) = (Vec::new(), vec![0; ranks]);
    for (to, count) in counts.iter_mut().enumerate() {
        let start = data.len();
        for transfer in transfers.iter().filter(|t| (t.from, t.to) == (rank, to)) {
            let held = ids.iter().zip(experts).find(|(id, _)| **id == transfer.expert);
            let bytes = held.map(|(_, expert)| expert.to_bytes()).unwrap_or_default();
            data.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            data.extend_from_slice(&bytes);
        }
        *count = data.len() - start;
    }
    (data, counts)
}

/// The experts that arrived at `rank`.
fn read(
    transfers: &[Transfer],
    received: &Received<u8>,
    rank: usize,
) -> Result<Vec<(LogicalId, Expert)>> {
    let mut experts = Vec::new();
    for (from, mut part) in received.iter().enumerate() {
        let short = || {
            Error::input("expert weights", format!("rank {from} sent fewer experts than agreed"))
        };
        for transfer in transfers.iter().filter(|t| (t.from, t.to) == (from, rank)) {
            let (len, rest) = part.split_first_chunk().ok_or_else(short)?;
            let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| short())?;
            let (bytes, rest) = rest.split_at_checked(len).ok_or_else(short)?;
            experts.push((transfer.expert, Expert::from_bytes(bytes)?));
            part = rest;
        }
    }
    Ok(experts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(by_rank: &[&[u32]]) -> ExpertMap {
        let ids: Vec<Vec<LogicalId>> =
            by_rank.iter().map(|rank| rank.iter().copied().map(LogicalId).collect()).collect();
        let experts = by_rank.concat().iter().max().map_or(0, |most| *most as usize + 1);
        ExpertMap::new(experts, &ids).unwrap()
    }

    fn ways(old: &[&[u32]], new: &[&[u32]]) -> Vec<(u32, usize, usize)> {
        let all = transfers(&map(old), &map(new)).unwrap();
        all.into_iter().map(|t| (t.expert.0, t.from, t.to)).collect()
    }

    #[test]
    fn receivers_are_divided_evenly_among_owners() {
        // expert 0: on ranks 0 and 1; ranks 2 to 6 need it: two each, the fifth from the first
        let old: &[&[u32]] = &[&[0], &[0], &[1], &[2], &[3], &[4], &[5]];
        let new: &[&[u32]] = &[&[0, 1], &[0, 2], &[1, 0], &[2, 0], &[3, 0], &[4, 0], &[5, 0]];
        let want = [(0, 0, 2), (0, 0, 3), (0, 0, 6), (0, 1, 4), (0, 1, 5), (1, 2, 0), (2, 3, 1)];
        assert_eq!(ways(old, new), want);
    }

    #[test]
    fn nothing_moves_twice_or_to_where_it_is() {
        assert_eq!(ways(&[&[0, 1], &[2, 0]], &[&[1, 0], &[0, 2]]), []);
        // two copies on one rank: one transfer
        assert_eq!(ways(&[&[0, 1], &[2, 1]], &[&[0, 1], &[0, 0, 2]]), [(0, 0, 1)]);
        assert!(transfers(&map(&[&[0], &[1]]), &map(&[&[0, 1]])).is_err());
    }
}
