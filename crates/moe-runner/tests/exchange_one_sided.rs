//! Ranks that write into each other's memory, over plain memory and threads: the order of the steps, where rows, slots
//! and outputs lie, that two meetings a pass are enough, and the same bits as on one rank.

mod host_gpus;

use std::sync::Arc;

use host_gpus::Own;
use host_gpus::put::{Memory, Put};
use host_gpus::small::{H, Held, K, batch, on_one_rank, placements};
use moe_runner::Result;
use moe_runner::comm::{At, Communicator, Step, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::exchange::one_sided::{Meeting, Places, Signals, run};
use moe_runner::exchange::resident::{ResidentWire, Ways};
use moe_runner::router::LogicalId;

const MOST: usize = 9;

/// Passes one after another, of any sizes, with nothing between them but the meetings: a rank that is early must not
/// touch what another one still reads.
#[test]
fn passes_that_follow_one_another_give_the_bits_of_one_rank() {
    let passes = [[5, 9, 2, 7], [0, 3, 0, 1], [1, 0, 0, 0], [0; 4], [9, 9, 9, 9], [4, 1, 8, 2]];
    for ranks in [1, 2, 3, 4] {
        for map in placements(ranks) {
            let all = Memory::all(ranks, 1, MOST, (H, K));
            run_ranks(ranks, |group| {
                let me = group.rank();
                for (pass, tokens) in passes.iter().cycle().take(10 * passes.len()).enumerate() {
                    let of = batch(pass * ranks + me, tokens[me]);
                    let (x, ids, weights) = (&of.0[..], &of.1[..], &of.2[..]);
                    let own = Own { group, map: &map, width: H, top_k: K, x, ids, weights };
                    let held = Held(map.held_by(me));
                    let mut host = Put::new(own, &held, &all);
                    // known to all, so that nobody waits but where ranks meet
                    host.waits.most = tokens[..ranks].iter().max().copied();
                    let places = run(&mut host, 1)?;
                    assert_eq!(host.out, on_one_rank(&of), "pass {pass} of {ranks} ranks, {map:?}");
                    if pass < passes.len()
                        && let [places] = places[..]
                    {
                        counted(group, &map, places, ids, host.moved)?;
                    }
                }
                Ok(())
            })
            .unwrap();
        }
    }
}

/// The bytes that a rank put, and got, are those that are predicted from counts.
fn counted(
    group: &Arc<dyn Communicator>,
    map: &ExpertMap,
    places: Places,
    ids: &[u32],
    moved: [(usize, usize); 2],
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
    assert_eq!(moved, places.traffic(&ways, wire));
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

#[test]
fn micro_batches_are_cut_alike_on_all_ranks() {
    for (most, lanes) in [(0, 2), (1, 2), (7, 2), (9, 4), (3, 5)] {
        let cut = Places { ranks: 3, most, top_k: 2 }.lanes(lanes);
        assert_eq!(cut.iter().map(|lane| lane.most).sum::<usize>(), most);
        assert_eq!(cut.len(), lanes.min(most));
        // no rank has more rows in one than the one with most of them
        for (lane, places) in cut.iter().enumerate() {
            for rows in 0..=most {
                assert!(rows / lanes + usize::from(lane < rows % lanes) <= places.most);
            }
        }
    }
}

/// Whoever has come as often is not waited for; of those who have not, the first to be waited for is named, and where it
/// was last.
#[test]
fn signals_tell_who_is_late() {
    let signals = Signals { ranks: 3 };
    let mut words = vec![0; signals.words()];
    assert_eq!(signals.late(&words), None);
    let mut come = |number: usize, meeting: Meeting, count: u32, layer: u32| {
        words[signals.count(meeting, number)] = count;
        words[signals.layer(meeting, number)] = layer;
        signals.late(&words)
    };
    let late = come(0, Meeting::Rows, 1, 4).unwrap();
    assert_eq!((late.number, late.at, late.seen), (1, (Meeting::Rows, 4), None));
    assert_eq!(come(1, Meeting::Rows, 1, 4).unwrap().number, 2);
    assert_eq!(come(2, Meeting::Rows, 1, 4), None);
    let late = come(0, Meeting::Outputs, 1, 4).unwrap();
    assert_eq!((late.number, late.at), (1, (Meeting::Outputs, 4)));
    assert_eq!(late.seen, Some((Meeting::Rows, 4)));
    come(1, Meeting::Outputs, 1, 4);
    // one that is ahead is waited for by nobody
    assert_eq!(come(1, Meeting::Rows, 2, 5).unwrap().number, 2);
    assert_eq!(come(2, Meeting::Outputs, 1, 4), None);
    let late = come(0, Meeting::Rows, 2, 5).unwrap();
    assert_eq!((late.number, late.seen), (2, Some((Meeting::Outputs, 4))));
    // counts go round
    for number in 0..3 {
        come(number, Meeting::Rows, u32::MAX, 6);
        come(number, Meeting::Outputs, u32::MAX, 6);
    }
    assert_eq!(come(0, Meeting::Rows, 0, 7).unwrap().at, (Meeting::Rows, 7));
}
