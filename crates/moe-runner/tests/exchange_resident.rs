//! Rows that stay where they are computed with, over plain memory and threads: the order of the steps, what goes
//! where, and the same bits as on one rank.

mod host_gpus;

use std::sync::Arc;

use host_gpus::Own;
use host_gpus::sent::Sent;
use host_gpus::small::{H, Held, K, batch, on_one_rank, placements};
use moe_runner::Result;
use moe_runner::comm::{Communicator, Kind, run_ranks};
use moe_runner::exchange::ExpertMap;
use moe_runner::exchange::resident::{ResidentWire, Room, Ways, run};

fn forward(
    world: &Arc<dyn Communicator>,
    map: &Arc<ExpertMap>,
    tokens: usize,
    room: Option<Room>,
) -> Result<Vec<f32>> {
    let (x, ids, weights) = batch(world.rank(), tokens);
    let (x, ids, weights) = (&x[..], &ids[..], &weights[..]);
    let own = Own { group: world, map, width: H, top_k: K, x, ids, weights };
    let held = Held(map.held_by(world.rank()));
    let mut host = Sent::new(own, &held, room, 1);
    let before = world.traffic().read();
    let ways = run(&mut host, (world.rank(), world.size()), room, 1)?;
    let [ways] = &ways[..] else { panic!("one batch: {ways:?}") };
    // what crossed is what the ways say
    let wire = ResidentWire { row: H * size_of::<f32>(), output: H * size_of::<f32>() };
    let [counts, there, back] = ways.traffic(wire, world.size());
    assert_eq!(counts.is_none(), room.is_some());
    let crossed = world.traffic().read().since(&before).of(Kind::AllToAllV);
    let said = [there, back].into_iter().flatten();
    let (sent, received) = said.fold((0, 0), |(s, r), (sent, received)| (s + sent, r + received));
    assert_eq!((crossed.sent, crossed.received), (sent as u64, received as u64));
    Ok(host.out())
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
