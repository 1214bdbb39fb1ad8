//! The single verbs against values computed on the host in float64, or exactly.

mod common;

use common::{Numbers, bf16, f16, from_bf16, nmse, setup};
use moe_cuda::fault::FaultKind;
use moe_cuda::{Error, FaultWord, Float, Norm, Plan, RowQuantiser, Rows, RowsMut};
use moe_kernels::numerics::quantise::{GroupScale, Qdq};

#[test]
fn convert_rounds_to_nearest_and_keeps_strides() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(1);
    let (rows, cols, stride) = (7, 33, 40);
    let from = n.units(rows * stride);
    let device = s.upload(&from);
    let mut to = s.buffer::<u16>(rows * cols);
    let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    for float in [Float::Bf16, Float::F16] {
        // SAFETY: the buffer holds `rows` rows of that stride.
        let source =
            unsafe { Rows::from_raw(raw(&device), Float::F32, rows, cols, stride) }.unwrap();
        let mut target = RowsMut::new(to.view_mut(), float, rows, cols).unwrap();
        s.verbs.convert(&s.stream, source, &mut target, Some(&fault)).unwrap();
        let dense: Vec<f32> =
            from.chunks(stride).flat_map(|row| row[..cols].iter().copied()).collect();
        let want = if float == Float::Bf16 { bf16(&dense) } else { f16(&dense) };
        assert_eq!(s.download(to.view()), want);
    }
    fault.check(&s.stream).unwrap();
}

/// The address of a buffer, as an engine would have it.
fn raw(buffer: &moe_cuda::Buffer<f32>) -> u64 {
    buffer.view().address()
}

#[test]
fn a_hidden_state_that_is_not_finite_is_a_sticky_fault() {
    let Some(s) = setup() else { return };
    let mut values = vec![0.5f32; 6 * 8];
    (values[3 * 8 + 5], values[5 * 8]) = (f32::NAN, f32::INFINITY);
    let from = s.upload(&values);
    let mut to = s.buffer::<f32>(values.len());
    let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    let source = Rows::new(from.view(), Float::F32, 6, 8).unwrap();
    let mut target = RowsMut::new(to.view_mut(), Float::F32, 6, 8).unwrap();
    s.verbs.convert(&s.stream, source, &mut target, Some(&fault)).unwrap();
    // later work does not clear it
    s.verbs.scale_add(&s.stream, &mut target, 2.0, None).unwrap();
    match fault.check(&s.stream) {
        Err(Error::Fault(fault)) => {
            assert_eq!(fault.kind(), FaultKind::Hidden);
            assert!([3, 5].contains(&fault.row()), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    fault.check(&s.stream).unwrap();
}

#[test]
fn norms_follow_their_formula() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(2);
    let (rows, cols) = (5, 1000);
    let (x, w) = (n.units(rows * cols), n.units(cols));
    let (device, weight) = (s.upload(&x), s.upload(&w));
    let mut to = s.buffer::<f32>(x.len());
    for (unit_offset, scale_first) in [(false, false), (true, false), (false, true)] {
        let norm = Norm { eps: 1e-5, unit_offset, scale_first, factor: 0.25 };
        let source = Rows::new(device.view(), Float::F32, rows, cols).unwrap();
        let mut target = RowsMut::new(to.view_mut(), Float::F32, rows, cols).unwrap();
        s.verbs.norm(&s.stream, norm, source, Some(weight.view()), &mut target).unwrap();
        let want: Vec<f64> = x
            .chunks(cols)
            .flat_map(|row| {
                let w = |c: usize| f64::from(w[c]) + if unit_offset { 1.0 } else { 0.0 };
                let first = |c: usize| f64::from(row[c]) * if scale_first { w(c) } else { 1.0 };
                let square = (0..cols).map(|c| first(c).powi(2)).sum::<f64>() / cols as f64;
                let scale = 0.25 / (square + f64::from(1e-5f32)).sqrt();
                (0..cols).map(move |c| f64::from(row[c]) * w(c) * scale).collect::<Vec<_>>()
            })
            .collect();
        assert!(nmse(&s.download(to.view()), &want) < 1e-13);
    }
}

#[test]
fn rows_are_quantised_as_on_the_host_bit_by_bit() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(3);
    let (rows, cols) = (9, 300);
    let mut x: Vec<f32> = n.units(rows * cols).iter().map(|v| v * v * v * 37.0).collect();
    x[2 * cols..3 * cols].fill(0.0); // a row of zeros
    x[4 * cols + 7] = 1e30;
    x[5 * cols + 9] = f32::NAN; // takes its group along
    for (ours, host) in [
        (RowQuantiser::Fp8Static(0.07), Qdq::Fp8Static { scale: 0.07 }),
        (RowQuantiser::Fp8Token, Qdq::Fp8Token),
        (
            RowQuantiser::Fp8Group { size: 128, power_of_two: false },
            Qdq::Fp8Group { size: 128, scale: GroupScale::F32 },
        ),
        (
            RowQuantiser::Fp8Group { size: 64, power_of_two: true },
            Qdq::Fp8Group { size: 64, scale: GroupScale::PowerOfTwo },
        ),
        (RowQuantiser::Int8Static(0.2), Qdq::Int8Static { scale: 0.2 }),
        (RowQuantiser::Int8Token, Qdq::Int8Token),
        (RowQuantiser::Int8Group { size: 32 }, Qdq::Int8Group { size: 32 }),
    ] {
        let mut device = s.upload(&x);
        let mut target = RowsMut::new(device.view_mut(), Float::F32, rows, cols).unwrap();
        s.verbs.quantise(&s.stream, ours, &mut target).unwrap();
        let got = s.download(device.view());
        let mut want = x.clone();
        host.apply(moe_kernels::isa::Cpu::detect(), &mut want, cols);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            assert!(same, "{ours:?}: value {i}: {got} for {want}, of {}", x[i]);
        }
    }
}

#[test]
fn the_gate_product_is_right_and_no_row_depends_on_another() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(4);
    // rows that are and are not whole runs of columns
    for (tokens, hidden, experts) in [(100, 777, 37), (100, 776, 37), (70, 2048, 128)] {
        let (x, w, b) = (n.units(tokens * hidden), n.units(experts * hidden), n.units(experts));
        let (xd, wd, bd) = (s.upload(&x), s.upload(&bf16(&w)), s.upload(&b));
        let w = from_bf16(&bf16(&w));
        let mut out = s.buffer::<f32>(tokens * experts);
        let weights = Rows::new(wd.view(), Float::Bf16, experts, hidden).unwrap();
        let mut product = |from: usize, to: usize| {
            let rows = to - from;
            let view = xd.view().part(from * hidden..to * hidden);
            let source = Rows::new(view, Float::F32, rows, hidden).unwrap();
            let target = out.view_mut().part(0..rows * experts);
            let mut target = RowsMut::new(target, Float::F32, rows, experts).unwrap();
            s.verbs.linear(&s.stream, source, weights, Some(bd.view()), &mut target).unwrap();
            s.download(out.view().part(0..rows * experts))
        };
        let all = product(0, tokens);
        let want: Vec<f64> = (0..tokens * experts)
            .map(|i| {
                let (t, e) = (i / experts, i % experts);
                let dot: f64 = (0..hidden)
                    .map(|k| f64::from(x[t * hidden + k]) * f64::from(w[e * hidden + k]))
                    .sum();
                dot + f64::from(b[e])
            })
            .collect();
        assert!(nmse(&all, &want) < 1e-11);
        for (from, to) in [(0, 1), (7, 8), (69, 70), (3, 8), (1, 42)] {
            assert_eq!(product(from, to), all[from * experts..to * experts], "{from}..{to}");
        }
    }
}

#[test]
fn combine_adds_in_slot_order_and_leaves_out_what_is_no_expert() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(5);
    let (tokens, top_k, cols, experts) = (11, 5, 70, 8);
    let y = n.units(tokens * top_k * cols);
    let ids: Vec<u32> = (0..tokens * top_k).map(|_| n.below(experts + 2) as u32).collect();
    let w = n.units(tokens * top_k);
    let (yd, idsd, wd) = (s.upload(&y), s.upload(&ids), s.upload(&w));
    let mut out = s.buffer::<f32>(tokens * cols);
    let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    for weighted in [true, false] {
        let source = Rows::new(yd.view(), Float::F32, tokens * top_k, cols).unwrap();
        let mut target = RowsMut::new(out.view_mut(), Float::F32, tokens, cols).unwrap();
        let weights = weighted.then(|| wd.view());
        s.verbs
            .combine(&s.stream, source, idsd.view(), weights, experts, 2.5, &mut target, &fault)
            .unwrap();
        let want: Vec<f32> = (0..tokens * cols)
            .map(|i| {
                let (t, c) = (i / cols, i % cols);
                let slots = (t * top_k..(t + 1) * top_k).filter(|&s| ids[s] < experts as u32);
                let w = |s: usize| if weighted { w[s] } else { 1.0 };
                2.5 * slots.fold(0.0f32, |sum, s| sum + w(s) * y[s * cols + c])
            })
            .collect();
        assert_eq!(s.download(out.view()), want);
    }
    fault.check(&s.stream).unwrap();
}

#[test]
fn identity_experts_add_the_tokens_own_row() {
    let Some(s) = setup() else { return };
    let (ids, weights) = ([0u32, 9, 8, 3, u32::MAX, 1], [0.5f32, 0.25, 2.0, 1.0, 4.0, 8.0]);
    let (x, y) = ([1.0f32, 2.0, 3.0, 4.0], [10.0f32, 20.0, 30.0, 40.0]);
    let (ids, weights) = (s.upload(&ids), s.upload(&weights));
    let (x, mut y) = (s.upload(&x), s.upload(&y));
    let mut factor = s.buffer::<f32>(2);
    s.verbs
        .identity_weights(&s.stream, ids.view(), weights.view(), 8, 10, factor.view_mut())
        .unwrap();
    assert_eq!(s.download(factor.view()), [2.25, 0.0]);
    let rows = Rows::new(x.view(), Float::F32, 2, 2).unwrap();
    let mut target = RowsMut::new(y.view_mut(), Float::F32, 2, 2).unwrap();
    s.verbs.scale_add(&s.stream, &mut target, 0.5, Some((2.0, rows, Some(factor.view())))).unwrap();
    assert_eq!(s.download(y.view()), [5.0 + 4.5, 10.0 + 9.0, 15.0, 20.0]);
}

#[test]
fn the_plan_is_a_stable_sort_at_any_size() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(6);
    let (most, top_k) = (70_000, 2);
    for (experts, tile) in [(3, 8), (128, 128), (600, 32)] {
        let mut plan = Plan::new(s.gpu(), most, experts, tile).unwrap();
        for slots in [2, 30, 1024, 1026, 5000, most] {
            // uneven, with ids that are no expert
            let ids: Vec<u32> = (0..slots)
                .map(|_| {
                    let id = n.below(experts + 1).min(n.below(experts + 1)) as u32;
                    if id == experts as u32 { u32::MAX } else { id }
                })
                .collect();
            let device = s.upload(&ids);
            s.verbs.plan(&s.stream, device.view(), top_k, &mut plan).unwrap();
            let mut order: Vec<u32> =
                (0..slots as u32).filter(|&s| ids[s as usize] != u32::MAX).collect();
            order.sort_by_key(|&slot| ids[slot as usize]);
            let mut offsets = vec![0u32; experts + 1];
            let mut tiles = Vec::new();
            for e in 0..experts {
                let count = ids.iter().filter(|&&id| id == e as u32).count();
                offsets[e + 1] = offsets[e] + count as u32;
                let firsts = (offsets[e]..offsets[e + 1]).step_by(tile);
                tiles.extend(firsts.flat_map(|first| [e as u32, first]));
            }
            assert_eq!(s.download(plan.offsets()), offsets);
            assert_eq!(s.download(plan.order().part(0..order.len())), order);
            assert_eq!(s.download(plan.tile_count()), [tiles.len() as u32 / 2]);
            assert_eq!(s.download(plan.tiles().part(0..tiles.len())), tiles);
            let place = s.download(plan.place().part(0..slots));
            for (slot, &id) in ids.iter().enumerate() {
                let want = order.iter().position(|&s| s as usize == slot);
                if slots <= 5000 {
                    assert_eq!(place[slot], want.map_or(u32::MAX, |at| at as u32));
                } else if id != u32::MAX {
                    assert_eq!(order[place[slot] as usize], slot as u32);
                    break;
                }
            }
        }
    }
}

#[test]
fn an_illegal_access_names_the_step() {
    // In a process of its own: the GPU is lost to it afterwards.
    if std::env::var_os("ILLEGAL_ACCESS").is_none() {
        let Some(_) = setup() else { return };
        let me = std::env::current_exe().unwrap();
        let output = std::process::Command::new(me)
            .args(["an_illegal_access_names_the_step", "--exact", "--nocapture"])
            .env("ILLEGAL_ACCESS", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("model.layers.3.mlp, scale_add"), "{text}\n{errors}");
        return;
    }
    let s = setup().unwrap();
    s.stream.synchronize().unwrap();
    s.stream.set_layer("model.layers.3.mlp".into());
    // SAFETY: not at all, on purpose: nothing lies at this address.
    let mut rows = unsafe { RowsMut::from_raw(0x10, Float::F32, 1, 1, 1) }.unwrap();
    s.verbs.scale_add(&s.stream, &mut rows, 1.0, None).unwrap();
    println!("{}", s.stream.synchronize().unwrap_err());
    std::process::exit(0);
}
