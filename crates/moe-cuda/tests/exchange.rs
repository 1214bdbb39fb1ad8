//! What goes between ranks, with all ranks on one GPU and copies in place of what carries it: every slot meets its
//! expert with its row, and its output is summed where it came from; with counts, with room, and one-sided.

mod common;

use common::{Numbers, Setup, setup};
use moe_cuda::fault::FaultKind;
use moe_cuda::{
    Buffer, Error, ExchangeVerbs, FaultWord, Float, Homes, Meeting, OneSidedVerbs, Packed, Parts,
    Room, Rows, RowsMut, SlotOutputs, StopWord, Stream, View, ViewMut, Windows,
};

const H: usize = 16;
const K: usize = 3;
const EXPERTS: usize = 9;

/// One rank.
struct Rank {
    x: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    homes: Homes,
    parts: Parts,
    /// Records and rows: what stays or has come, and what goes.
    here: (Buffer<u32>, Buffer<u8>),
    go: (Buffer<u32>, Buffer<u8>),
}

/// The rank and place of expert `id`'s copy for row `t`: experts in turn, and a second copy of the first two.
fn copies(all: usize) -> Vec<Vec<(u32, u32)>> {
    let mut held = vec![0; all];
    let mut copies = vec![Vec::new(); EXPERTS];
    for (id, of) in copies.iter_mut().enumerate() {
        for rank in
            [id % all, (id + 1) % all].into_iter().take(if id < 2 && all > 1 { 2 } else { 1 })
        {
            of.push((rank as u32, held[rank]));
            held[rank] += 1;
        }
    }
    copies
}

fn home(copies: &[Vec<(u32, u32)>], id: u32, t: usize) -> Option<(usize, u32)> {
    let of = copies.get(id as usize)?;
    let copy =
        if of.len() == 1 { 0 } else { (t as u32).wrapping_mul(2_654_435_769) as usize % of.len() };
    Some((of[copy].0 as usize, of[copy].1))
}

/// What the expert at `local` of `rank` makes of a row.
fn expert(rank: usize, local: u32, row: &[f32]) -> Vec<f32> {
    row.iter().map(|v| v * (1 + local) as f32 + rank as f32).collect()
}

/// A place of the device that somebody else's view names.
fn at<'a>(address: u64, len: usize) -> ViewMut<'a, u32> {
    // SAFETY: the caller's buffer holds as much, and nothing else uses it meanwhile.
    unsafe { ViewMut::from_raw(address, len) }
}

fn rank(
    s: &Setup,
    verbs: &ExchangeVerbs,
    (me, all): (usize, usize),
    tokens: usize,
    room: Room,
) -> (Rank, FaultWord) {
    let mut n = Numbers((me * 100 + tokens) as u64);
    let x = n.units(tokens * H);
    // some slots have no expert
    let ids: Vec<u32> = (0..tokens).flat_map(|_| n.distinct(K, EXPERTS + 2)).collect();
    let ids: Vec<u32> =
        ids.into_iter().map(|id| if id as usize >= EXPERTS { u32::MAX } else { id }).collect();
    let weights = n.units(tokens * K);
    let homes = Homes::new(&s.stream, &copies(all), me, all).unwrap();
    let mut parts = Parts::new(s.gpu(), 40, K, all).unwrap();
    assert!(parts.takes(tokens, K, all) && !parts.takes(41, K, all));
    let device = s.upload(&ids);
    verbs.sort(&s.stream, &s.verbs, &homes, (device.view(), K), &mut parts).unwrap();
    let (slots, rows) = match room {
        Room { slots: 0, .. } => (all * 40 * K, all * 40),
        Room { slots, rows } => (all * slots, all * rows),
    };
    let mut here = (s.buffer::<u32>(2 * slots), s.buffer::<u8>(rows * H * 4));
    let mut go = (s.buffer::<u32>(2 * slots), s.buffer::<u8>(rows * H * 4));
    let fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    let on_device = s.upload(&x);
    let x_rows = Rows::new(on_device.view(), Float::F32, tokens, H).unwrap();
    let stay = Packed { records: here.0.view_mut(), rows: here.1.view_mut() };
    let going = Packed { records: go.0.view_mut(), rows: go.1.view_mut() };
    // SAFETY: there is memory for all slots of all ranks.
    unsafe { verbs.pack(&s.stream, x_rows, (&parts, room), (stay, going), &fault) }.unwrap();
    s.stream.synchronize().unwrap();
    (Rank { x, ids, weights, homes, parts, here, go }, fault)
}

#[test]
fn slots_meet_their_experts_and_sums_their_rows() {
    let Some(s) = setup() else { return };
    let verbs = ExchangeVerbs::new(&s.modules).unwrap();
    for all in [1, 2, 3, 5] {
        for tokens in [[17, 5, 40, 1, 0], [0, 3, 0, 33, 2], [0; 5]] {
            for room in [Room::default(), Room { slots: 40 * K, rows: 40 }] {
                through(&s, &verbs, &tokens[..all], room);
            }
        }
    }
}

/// One pass over ranks with so many rows.
fn through(s: &Setup, verbs: &ExchangeVerbs, tokens: &[usize], room: Room) {
    let all = tokens.len();
    let place = format!("{tokens:?}, {room:?}");
    let counted = room == Room::default();
    let mut ranks: Vec<Rank> = Vec::new();
    for (me, &tokens) in tokens.iter().enumerate() {
        let (rank, mut fault) = rank(s, verbs, (me, all), tokens, room);
        fault.check(&s.stream).unwrap();
        ranks.push(rank);
    }
    // every line to every rank
    let lines: Vec<Vec<u32>> = (0..all)
        .map(|me| s.download(ranks[me].parts.counts().part(2 * all * me..2 * all * (me + 1))))
        .collect();
    for (me, line) in lines.iter().enumerate() {
        let slots = |to: usize| {
            let of = |(slot, id): (usize, &u32)| {
                home(&copies(all), *id, slot / K).map(|home| (slot / K, home.0))
            };
            let mine: Vec<usize> = ranks[me]
                .ids
                .iter()
                .enumerate()
                .filter_map(of)
                .filter(|h| h.1 == to)
                .map(|h| h.0)
                .collect();
            let mut rows = mine.clone();
            rows.dedup();
            (mine.len() as u32, rows.len() as u32)
        };
        for to in 0..all {
            assert_eq!((line[to], line[all + to]), slots(to), "{place}: {me} to {to}");
        }
    }
    let counts = lines.concat();
    let of = |from: usize, to: usize| match counted {
        true => (counts[2 * all * from + to] as usize, counts[2 * all * from + all + to] as usize),
        false => (room.slots, room.rows),
    };
    // rank by rank, from the one after: where its part begins in what goes from `me`, and in what comes to `me`
    let begins = |me: usize, there: bool| {
        let mut begin = if there { (0, 0) } else { of(me, me) };
        let mut all_begins = vec![((0, 0), (0, 0)); all];
        for d in 1..all {
            let peer = (me + d) % all;
            let len = if there { of(me, peer) } else { of(peer, me) };
            all_begins[peer] = (begin, len);
            begin = (begin.0 + len.0, begin.1 + len.1);
        }
        (all_begins, begin)
    };
    let sent: Vec<(Vec<u32>, Vec<u8>)> = ranks
        .iter()
        .map(|rank| (s.download(rank.go.0.view()), s.download(rank.go.1.view())))
        .collect();
    let mut outputs = Vec::new();
    for (me, rank) in ranks.iter_mut().enumerate() {
        let (comes, (places, rows)) = begins(me, false);
        if counted {
            s.stream.copy_in(&counts, at(rank.parts.counts().address(), counts.len())).unwrap();
        }
        for peer in (0..all).filter(|peer| *peer != me) {
            let ((slot, row), (slots, rows)) = comes[peer];
            let ((from, from_row), _) = begins(peer, true).0[me];
            let records = &sent[peer].0[2 * from..2 * (from + slots)];
            s.stream
                .copy_in(records, rank.here.0.view_mut().part(2 * slot..2 * (slot + slots)))
                .unwrap();
            let bytes = &sent[peer].1[from_row * H * 4..(from_row + rows) * H * 4];
            s.stream
                .copy_in(bytes, rank.here.1.view_mut().part(row * H * 4..(row + rows) * H * 4))
                .unwrap();
        }
        let (mut ids, mut row_of) = (s.buffer::<u32>(places), s.buffer::<u32>(places));
        let records = rank.here.0.view().part(0..2 * places);
        let by = (&rank.parts, &rank.homes, room);
        verbs.unpack(&s.stream, records, by, ids.view_mut(), row_of.view_mut()).unwrap();
        let bytes = s.download(rank.here.1.view().part(0..rows * H * 4));
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
        let mut output = vec![f32::NAN; places * H];
        for (place, (id, row)) in
            s.download(ids.view()).iter().zip(s.download(row_of.view())).enumerate()
        {
            if *id != u32::MAX {
                let made = expert(me, *id, &values[row as usize * H..][..H]);
                output[place * H..][..H].copy_from_slice(&made);
            }
        }
        outputs.push(output);
    }
    for (me, rank) in ranks.iter().enumerate() {
        let (goes, (slots, _)) = begins(me, true);
        let mut back = vec![f32::NAN; slots * H];
        for peer in (0..all).filter(|peer| *peer != me) {
            let ((begin, _), (len, _)) = goes[peer];
            let ((from, _), _) = begins(peer, false).0[me];
            back[begin * H..(begin + len) * H]
                .copy_from_slice(&outputs[peer][from * H..(from + len) * H]);
        }
        let (own, far) = (s.upload(&outputs[me]), s.upload(&back));
        let slot = |buffer: &Buffer<f32>| SlotOutputs {
            values: buffer.view().address(),
            value_bytes: 4 * H,
            scales: 0,
            scale_bytes: 0,
            tile: 0,
        };
        let tokens = rank.ids.len() / K;
        let weights = s.upload(&rank.weights);
        let mut out = s.buffer::<f32>(tokens * H);
        let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
        let mut rows = RowsMut::new(out.view_mut(), Float::F32, tokens, H).unwrap();
        let sides = (slot(&own), slot(&far));
        verbs
            .combine(
                &s.stream,
                (&rank.parts, room),
                sides,
                (weights.view(), 0.5),
                &mut rows,
                &fault,
            )
            .unwrap();
        fault.check(&s.stream).unwrap();
        assert_eq!(s.download(out.view()), wanted(rank, all), "{place}, rank {me}");
    }
}

/// Half the sum of a rank's slots.
fn wanted(rank: &Rank, all: usize) -> Vec<f32> {
    let mut want = vec![0.0; rank.x.len()];
    for (slot, id) in rank.ids.iter().enumerate() {
        let Some((to, local)) = home(&copies(all), *id, slot / K) else { continue };
        let made = expert(to, local, &rank.x[slot / K * H..][..H]);
        for (want, made) in want[slot / K * H..][..H].iter_mut().zip(made) {
            *want += rank.weights[slot] * made;
        }
    }
    want.iter_mut().for_each(|v| *v *= 0.5);
    want
}

/// One-sided, with all ranks' windows on one GPU and a stream for each rank: pass after pass with nothing between them
/// but the meetings.
#[test]
fn rows_and_outputs_that_ranks_put_are_summed() {
    let Some(s) = setup() else { return };
    let two_sided = ExchangeVerbs::new(&s.modules).unwrap();
    let verbs = OneSidedVerbs::new(&s.modules).unwrap();
    let stop = StopWord::new(s.gpu()).unwrap();
    let of = SlotOutputs { values: 0, value_bytes: 4 * H, scales: 0, scale_bytes: 0, tile: 0 };
    for all in [1, 2, 3, 5] {
        let streams: Vec<Stream> = (0..all).map(|_| Stream::new(s.gpu()).unwrap()).collect();
        // SAFETY: nothing is there, and nothing is read.
        let table = unsafe { View::from_raw(0, 0) };
        let largest = Windows { table, ranks: all, most: 40, top_k: K, row_bytes: 4 * H };
        let sizes = [largest.arrivals(), largest.outputs(of), Windows::signals(all)];
        let mut windows: Vec<[Buffer<u8>; 3]> =
            (0..all).map(|_| sizes.map(|size| s.buffer(size))).collect();
        for [_, _, signals] in &mut windows {
            s.stream.fill(signals.view_mut(), 0).unwrap();
        }
        s.stream.synchronize().unwrap();
        let tables: Vec<Buffer<u64>> = (0..all)
            .map(|me| {
                let of = |which: usize| {
                    (0..all).map(move |d| (which, (me + d) % all)).collect::<Vec<_>>()
                };
                let addresses: Vec<u64> = (0..3)
                    .flat_map(of)
                    .map(|(which, rank)| windows[rank][which].view().address())
                    .collect();
                s.upload(&addresses)
            })
            .collect();
        for tokens in [[17, 5, 40, 1, 0], [0, 3, 0, 33, 2], [40; 5], [1, 0, 0, 0, 0]] {
            let place = format!("{:?}", &tokens[..all]);
            let most = tokens[..all].iter().copied().max().unwrap().max(1);
            let mut ranks: Vec<Rank> = (0..all)
                .map(|me| rank(&s, &two_sided, (me, all), tokens[me], Room::default()).0)
                .collect();
            for rank in &mut ranks {
                rank.homes.count(Some(s.upload(&[0_u64; EXPERTS]))).unwrap();
            }
            let at = |me: usize| Windows { table: tables[me].view(), most, ..largest };
            let mut faults: Vec<FaultWord> =
                (0..all).map(|me| FaultWord::new(s.gpu(), &streams[me]).unwrap()).collect();
            let (mut xs, mut idss) = (Vec::new(), Vec::new());
            for rank in &ranks {
                xs.push(s.upload(&rank.x));
                idss.push(s.upload(&rank.ids));
            }
            // SAFETY: the windows are as large as they say; all ranks meet.
            unsafe {
                for me in 0..all {
                    let x = Rows::new(xs[me].view(), Float::F32, tokens[me], H).unwrap();
                    let rows = (x, idss[me].view());
                    verbs.put_rows(&streams[me], rows, &ranks[me].homes, &at(me)).unwrap();
                }
                for me in 0..all {
                    let patience = (&stop, 20.0);
                    let windows = at(me);
                    verbs
                        .meet(&streams[me], &windows, (Meeting::Rows, 7), patience, &faults[me])
                        .unwrap();
                }
            }
            let mut outputs = Vec::new();
            for me in 0..all {
                streams[me].synchronize().unwrap();
                let arrived = s.download(windows[me][0].view());
                let word = |at: usize| <[u8; 4]>::try_from(&arrived[at..at + 4]).unwrap();
                let mut made = vec![f32::NAN; at(me).slots() * H];
                for place in 0..at(me).slots() {
                    let id = u32::from_le_bytes(word(at(me).ids_at() + 4 * place));
                    if id == u32::MAX {
                        continue;
                    }
                    let row: Vec<f32> =
                        (0..H).map(|c| f32::from_le_bytes(word(4 * (place / K * H + c)))).collect();
                    made[place * H..][..H].copy_from_slice(&expert(me, id, &row));
                }
                outputs.push(s.upload(&made));
            }
            let mut sums = Vec::new();
            for me in 0..all {
                let values = outputs[me].view().address();
                let (of, windows) = (SlotOutputs { values, ..of }, at(me));
                // SAFETY: as above; an output for each slot.
                unsafe { verbs.put_outputs(&streams[me], of, EXPERTS, &windows) }.unwrap();
            }
            for me in 0..all {
                let windows = at(me);
                let meeting = (Meeting::Outputs, 7);
                // SAFETY: as above.
                unsafe { verbs.meet(&streams[me], &windows, meeting, (&stop, 20.0), &faults[me]) }
                    .unwrap();
            }
            for (me, rank) in ranks.iter().enumerate() {
                let weights = s.upload(&rank.weights);
                let mut out = s.buffer::<f32>(tokens[me] * H);
                s.stream.synchronize().unwrap();
                let mut rows = RowsMut::new(out.view_mut(), Float::F32, tokens[me], H).unwrap();
                let values = windows[me][1].view().address();
                let of = SlotOutputs { values, ..of };
                let slots = (idss[me].view(), weights.view());
                verbs
                    .combine(&streams[me], of, slots, (EXPERTS, 0.5), &mut rows, &faults[me])
                    .unwrap();
                faults[me].check(&streams[me]).unwrap();
                sums.push(s.download(out.view()));
            }
            for (me, rank) in ranks.iter_mut().enumerate() {
                assert_eq!(sums[me], wanted(rank, all), "{place}, rank {me}");
                let mut load = vec![0; EXPERTS];
                let real = rank.ids.iter().filter(|id| (**id as usize) < EXPERTS);
                real.for_each(|id| load[*id as usize] += 1);
                let counted = s.download(rank.homes.load().unwrap().view());
                assert_eq!(counted, load, "{place}, rank {me}");
                // who has come to both meetings how often, and where
                let signals = s.download(windows[me][2].view());
                let words: Vec<u32> =
                    signals.as_chunks().0.iter().map(|v| u32::from_le_bytes(*v)).collect();
                assert!(words[1..2 * all].iter().all(|count| *count == words[0]), "{words:?}");
                assert!(words[2 * all..4 * all].iter().all(|layer| *layer == 7), "{words:?}");
            }
        }
    }
}

/// A rank that does not come is a fault, and one that is told to stop does.
#[test]
fn who_waits_for_a_rank_in_vain_ends() {
    let Some(s) = setup() else { return };
    let verbs = OneSidedVerbs::new(&s.modules).unwrap();
    let mut memory = s.buffer::<u8>(2 * 4096);
    s.stream.fill(memory.view_mut(), 0).unwrap();
    let address = memory.view().address();
    let table = s.upload(&[address, address + 4096].repeat(3));
    let windows = Windows { table: table.view(), ranks: 2, most: 1, top_k: K, row_bytes: 4 * H };
    let (stop, mut fault) =
        (StopWord::new(s.gpu()).unwrap(), FaultWord::new(s.gpu(), &s.stream).unwrap());
    // SAFETY: the signals are there; nobody else comes.
    unsafe { verbs.meet(&s.stream, &windows, (Meeting::Rows, 7), (&stop, 0.1), &fault) }.unwrap();
    let error = fault.check(&s.stream).unwrap_err().to_string();
    assert!(error.contains("waited in vain for the 1. next rank"), "{error}");
    // SAFETY: as above.
    unsafe { verbs.meet(&s.stream, &windows, (Meeting::Rows, 7), (&stop, 1e6), &fault) }.unwrap();
    stop.stop();
    fault.check(&s.stream).unwrap();
}

#[test]
fn what_has_no_room_is_a_fault() {
    let Some(s) = setup() else { return };
    let verbs = ExchangeVerbs::new(&s.modules).unwrap();
    let (_, mut fault) = rank(&s, &verbs, (0, 2), 40, Room { slots: 7, rows: 7 });
    match fault.check(&s.stream) {
        Err(Error::Fault(fault)) => {
            assert_eq!(fault.kind(), FaultKind::Capacity);
            assert!(fault.to_string().contains("room for 7 slots or rows"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
}
