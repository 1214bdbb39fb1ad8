//! Experts that go from one placement to another: which rank sends which where, and the order in which each does its
//! part, whatever memory holds its weights.
//!
//! ```text
//! make room   memory for the new placement, beside the old
//! keep        what this rank has and is to have, copied there
//! exchange    what others have or are to have: bytes as they are packed, sent and received
//! copy        a second time what has come, where this rank is to have it twice
//! ```
//! [`carry`] is that order; a [`Shelf`] has the memory and does the steps: experts of the host as they are stored, or a
//! GPU's as its kernel holds them. Passes read the old memory until the new one takes its place, between two of them.
//!
//! Which rank sends which expert where follows from the two placements alone, so that every rank
//! knows it without asking. An expert that a rank holds already is kept there; for each other one
//! the ranks that need it are divided evenly among those that have it.

use crate::exchange::ExpertMap;
use crate::router::{LocalId, LogicalId};
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

/// What one rank does, by places of its weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Places of the new placement.
    pub places: usize,
    /// What stays: its place in the old placement, and in the new one.
    pub keep: Vec<(LocalId, LocalId)>,
    /// Which rank gets what is at a place of the old placement. What goes from one rank to another is, here and there, in
    /// the order of the experts.
    pub send: Vec<(usize, LocalId)>,
    /// From which rank comes what belongs to a place of the new placement.
    pub receive: Vec<(usize, LocalId)>,
    /// Places of the new placement: to the second belongs what has come to the first.
    pub copy: Vec<(LocalId, LocalId)>,
}

impl Moves {
    /// Of `rank`.
    ///
    /// # Errors
    /// As [`transfers`].
    pub fn new(old: &ExpertMap, new: &ExpertMap, rank: usize) -> Result<Self> {
        let (had, has) = (old.held_by(rank), new.held_by(rank));
        let place = |held: &[LogicalId], id: LogicalId| {
            held.iter().position(|held| *held == id).map(|at| LocalId(at as u32))
        };
        let mut moves = Self { places: has.len(), ..Self::default() };
        for Transfer { expert, from, to } in transfers(old, new)? {
            if from == rank {
                moves.send.extend(place(had, expert).map(|at| (to, at)));
            }
            if to == rank {
                moves.receive.extend(place(has, expert).map(|at| (from, at)));
            }
        }
        for (at, id) in has.iter().enumerate() {
            let at = LocalId(at as u32);
            match (place(had, *id), place(has, *id)) {
                (Some(kept), _) => moves.keep.push((kept, at)),
                (None, Some(first)) if first != at => moves.copy.push((first, at)),
                _ => {}
            }
        }
        Ok(moves)
    }
}

/// Memory of a rank's experts, place by place, and the way to that of other ranks.
pub trait Shelf {
    /// Memory for so many places, beside the old.
    ///
    /// # Errors
    /// Too little memory.
    fn make_room(&mut self, places: usize) -> Result<()>;

    /// Copies what is at a place of the old memory to one of the new.
    ///
    /// # Errors
    /// What the memory refuses.
    fn keep(&mut self, from: LocalId, to: LocalId) -> Result<()>;

    /// Sends from the old memory, receives to the new: all ranks together.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn exchange(&mut self, moves: &Moves) -> Result<()>;

    /// Copies within the new memory.
    ///
    /// # Errors
    /// As [`Self::keep`].
    fn copy(&mut self, from: LocalId, to: LocalId) -> Result<()>;
}

/// One rank's part of it.
///
/// # Errors
/// As the steps of `shelf`.
pub fn carry(shelf: &mut dyn Shelf, moves: &Moves) -> Result<()> {
    shelf.make_room(moves.places)?;
    for (from, to) in &moves.keep {
        shelf.keep(*from, *to)?;
    }
    shelf.exchange(moves)?;
    for (from, to) in &moves.copy {
        shelf.copy(*from, *to)?;
    }
    Ok(())
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

    #[test]
    fn every_place_of_a_rank_is_filled_once() {
        let (old, new) = (map(&[&[0, 1], &[2, 3]]), map(&[&[3, 1, 3], &[0, 2]]));
        let places = |all: &[(u32, u32)]| -> Vec<(LocalId, LocalId)> {
            all.iter().map(|(from, to)| (LocalId(*from), LocalId(*to))).collect()
        };
        let first = Moves::new(&old, &new, 0).unwrap();
        // expert 1 stays, 0 goes; 3 comes, and has two places
        assert_eq!((first.places, first.keep), (3, places(&[(1, 1)])));
        assert_eq!((first.send, first.receive), (vec![(1, LocalId(0))], vec![(1, LocalId(0))]));
        assert_eq!(first.copy, places(&[(0, 2)]));
        let second = Moves::new(&old, &new, 1).unwrap();
        assert_eq!((second.keep, second.copy), (places(&[(0, 1)]), vec![]));
        assert_eq!((second.send, second.receive), (vec![(0, LocalId(1))], vec![(0, LocalId(0))]));
    }
}
