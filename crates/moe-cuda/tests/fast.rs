//! The fast experts against float64: few tokens in one launch, many tokens on tensor cores. Rows are
//! bf16. Every batch is run twice, and once as a graph: the counters come back to where they were.

mod common;

use common::experts::{Experts, Format, batch, plain, scaled};
use common::{Numbers, Setup, bf16, from_bf16, nmse, setup};
use moe_cuda::router::{
    Correction, Groups, Renormalise, Router, RouterOptions, RouterTensors, RoutingMut, Score,
    WeightFrom,
};
use moe_cuda::weights::{Activation, Element, ScaleType};
use moe_cuda::{
    Buffer, Error, ExpertWeights, FaultWord, FewBatch, FewExperts, FewGate, FewWorkspace, Float,
    ManyExperts, ManyWorkspace, Plan, Rows, RowsMut, SlotHomes, View,
};
use moe_kernels::numerics::quantise::{GroupScale, Qdq};

const BF16: Format = plain(Element::Bf16);
const FP8: Format = scaled(Element::E4m3, ScaleType::F32, (128, 128));
const INT4: Format = scaled(Element::Uint4, ScaleType::Bf16, (1, 128));
const MXFP4: Format = scaled(Element::E2m1, ScaleType::E8m0, (1, 32));

/// Which kernel, with its workspace.
enum Kernel {
    Few(Box<FewExperts>, FewWorkspace),
    Many(Box<ManyExperts>, Box<ManyWorkspace>),
}

struct Pass {
    kernel: Kernel,
    x: Buffer<u16>,
    ids: Buffer<u32>,
    weights: Buffer<f32>,
    out: Buffer<u16>,
    plan: Plan,
    fault: FaultWord,
    hidden: usize,
    experts: usize,
}

impl Pass {
    fn new(s: &Setup, weights: ExpertWeights, slots: usize, many: bool) -> moe_cuda::Result<Self> {
        let hidden = weights.hidden();
        let experts = weights.up.experts;
        let tile = if many { ManyExperts::TILE } else { FewExperts::TILE };
        let kernel = if many {
            let kernel = ManyExperts::new(&s.modules, &s.stream, weights)?;
            let work = kernel.workspace(&s.stream, slots)?;
            Kernel::Many(Box::new(kernel), Box::new(work))
        } else {
            let kernel = FewExperts::new(&s.modules, &s.stream, weights)?;
            let work = kernel.workspace(&s.stream, slots)?;
            Kernel::Few(Box::new(kernel), work)
        };
        Ok(Self {
            kernel,
            x: s.buffer(slots * hidden),
            ids: s.buffer(slots),
            weights: s.buffer(slots),
            out: s.buffer(slots * hidden),
            plan: Plan::new(s.gpu(), slots, experts, tile)?,
            fault: FaultWord::new(s.gpu(), &s.stream)?,
            hidden,
            experts,
        })
    }

    fn load(&mut self, s: &Setup, x: &[u16], ids: &[u32], weights: &[f32]) {
        s.stream.copy_in(x, self.x.view_mut().part(0..x.len())).unwrap();
        s.stream.copy_in(ids, self.ids.view_mut().part(0..ids.len())).unwrap();
        s.stream.copy_in(weights, self.weights.view_mut().part(0..ids.len())).unwrap();
        s.stream.fill(self.out.view_mut(), 0xff).unwrap();
    }

    fn run(&mut self, s: &Setup, tokens: usize, top_k: usize) -> moe_cuda::Result<()> {
        let (hidden, slots) = (self.hidden, tokens * top_k);
        let ids = self.ids.view().part(0..slots);
        let weights = self.weights.view().part(0..slots);
        let x = self.x.view().part(0..tokens * hidden);
        let x = Rows::new(x, Float::Bf16, tokens, hidden)?;
        let out = self.out.view_mut().part(0..tokens * hidden);
        let mut out = RowsMut::new(out, Float::Bf16, tokens, hidden)?;
        let (plan, fault) = (&mut self.plan, &self.fault);
        let batch = FewBatch { x, ids, weights, factor: 1.0, fault };
        match &mut self.kernel {
            Kernel::Few(kernel, work) => {
                if slots > FewExperts::OWN_PLAN {
                    s.verbs.plan(&s.stream, ids, top_k, plan)?;
                }
                kernel.forward(&s.stream, &batch, Some(plan), work, &mut out)
            }
            Kernel::Many(kernel, work) => {
                s.verbs.plan(&s.stream, ids, top_k, plan)?;
                kernel.forward(&s.stream, &batch, plan, work, &mut out)
            }
        }
    }

    fn output(&mut self, s: &Setup, tokens: usize) -> Vec<u16> {
        self.fault.check(&s.stream).unwrap();
        s.download(self.out.view().part(0..tokens * self.hidden))
    }
}

/// Runs batches of several sizes; one token of each alone too.
fn check(
    s: &Setup,
    host: &Experts,
    pass: &mut Pass,
    batches: &[(usize, usize)],
    bound: f64,
    rows: &dyn Fn(Vec<f64>) -> Vec<f64>,
    n: &mut Numbers,
) {
    let (hidden, experts) = (pass.hidden, pass.experts);
    for &(tokens, top_k) in batches {
        let (x, mut ids, weights) = batch(n, tokens, hidden, experts, top_k);
        if tokens % 4 == 0 {
            // one expert has a row of every token
            ids.chunks_mut(top_k).filter(|ids| !ids.contains(&1)).for_each(|ids| ids[0] = 1);
        }
        let x = bf16(&x);
        pass.load(s, &x, &ids, &weights);
        pass.run(s, tokens, top_k).unwrap();
        let got = pass.output(s, tokens);
        let wide = from_bf16(&x);
        let sampled: Vec<usize> = (0..tokens).step_by(tokens.div_ceil(16)).collect();
        let want: Vec<f64> = sampled
            .iter()
            .flat_map(|&t| {
                let slots = t * top_k..(t + 1) * top_k;
                let x = &wide[t * hidden..][..hidden];
                host.token_with(x, &ids[slots.clone()], &weights[slots], false, rows)
            })
            .collect();
        let of_sampled: Vec<u16> =
            sampled.iter().flat_map(|&t| got[t * hidden..][..hidden].iter().copied()).collect();
        let error = nmse(&from_bf16(&of_sampled), &want);
        assert!(error < bound, "{tokens} tokens, top {top_k}: {error:e}");
        // again, and as a graph
        let graph = s.stream.capture(|| pass.run(s, tokens, top_k)).unwrap();
        for _ in 0..2 {
            pass.load(s, &x, &ids, &weights);
            // SAFETY: the buffers of the pass live.
            unsafe { s.stream.replay(&graph) }.unwrap();
            assert_eq!(pass.output(s, tokens), got, "{tokens} tokens, top {top_k}");
        }
        let t = tokens - 1;
        pass.load(s, &x[t * hidden..], &ids[t * top_k..], &weights[t * top_k..]);
        pass.run(s, 1, top_k).unwrap();
        assert_eq!(pass.output(s, 1), got[t * hidden..], "token {t} of {tokens} alone");
    }
}

const GPT_OSS: Activation = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 };

#[test]
fn few_tokens_are_within_the_bound_of_bf16() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(30);
    for (format, hidden, inner) in [
        (BF16, 512, 384),
        (BF16, 320, 64),
        (INT4, 512, 384),
        (INT4, 256, 2048),
        (MXFP4, 512, 384),
        (MXFP4, 320, 320),
    ] {
        for (activation, bias) in [(Activation::Silu, false), (GPT_OSS, true)] {
            let dims = [9, hidden, inner];
            let host = Experts::new(&s, &mut n, format, dims, true, activation, bias);
            let mut pass = Pass::new(&s, host.weights(), 512, false).unwrap();
            println!("{format:?} {dims:?} {activation:?}");
            check(&s, &host, &mut pass, &FEW, 1e-5, &|row| row, &mut n);
        }
    }
}

/// Tokens and k: plans by a warp, by a block and by their own kernel.
const FEW: [(usize, usize); 8] =
    [(1, 1), (1, 8), (4, 8), (16, 2), (5, 7), (17, 7), (16, 8), (64, 8)];

/// Rows as FP8 checkpoints want them.
fn quantised(row: Vec<f64>) -> Vec<f64> {
    let mut row: Vec<f32> = row.iter().map(|&x| x as f32).collect();
    let cols = row.len();
    Qdq::Fp8Group { size: 128, scale: GroupScale::F32 }.apply(
        moe_kernels::isa::Cpu::detect(),
        &mut row,
        cols,
    );
    row.iter().map(|&x| x.into()).collect()
}

#[test]
fn few_tokens_quantise_rows_as_fp8_checkpoints_do() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(35);
    for (hidden, inner) in [(512, 384), (256, 640), (4096, 128)] {
        for (activation, bias) in [(Activation::Silu, false), (GPT_OSS, true)] {
            let dims = [9, hidden, inner];
            let host = Experts::new(&s, &mut n, FP8, dims, true, activation, bias);
            let mut pass = Pass::new(&s, host.weights(), 512, false).unwrap();
            check(&s, &host, &mut pass, &FEW, 1e-4, &quantised, &mut n);
        }
    }
}

/// Gate and routing in the experts' launch: logits, ids, weights and outputs have the bits of the verbs.
#[test]
fn a_gate_in_front_gives_the_bits_of_the_verbs() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(36);
    let plain = RouterOptions::softmax(9, 3, Renormalise::Sum(0.0));
    let groups = Some(Groups { count: 4, keep: 2, top_two_sum: true, fill_zero: false });
    let (score, correction) = (Score::Sigmoid, Correction::OnScore);
    let deepseek =
        RouterOptions { experts: 64, top_k: 8, score, correction, groups, scale: 2.5, ..plain };
    let weight_from = WeightFrom::SoftmaxChosen;
    let gpt_oss = RouterOptions { experts: 128, top_k: 4, weight_from, ..plain };
    let weight_from = WeightFrom::JointSoftmax;
    let joint = RouterOptions { shared: 2, idle: 3, weight_from, soft_cap: Some(2.0), ..plain };
    for (format, options) in [
        (BF16, plain),
        (BF16, deepseek),
        (FP8, deepseek),
        (FP8, joint),
        (MXFP4, gpt_oss),
        (INT4, joint),
    ] {
        let (hidden, inner) = (512, 256);
        let dims = [options.experts, hidden, inner];
        let host = Experts::new(&s, &mut n, format, dims, true, Activation::Silu, false);
        let choices = options.experts + options.idle;
        let bias = s.upload(&n.units(choices));
        let tensors = RouterTensors {
            bias: (options.correction != Correction::None).then_some(bias),
            ..Default::default()
        };
        let router = Router::new(&s.modules, options, tensors).unwrap();
        let few = FewExperts::new(&s.modules, &s.stream, host.weights()).unwrap();
        let few = few.with_gate(&s.modules, &router).unwrap();
        let (k, width) = (options.top_k, choices + options.shared);
        let mut work = few.workspace(&s.stream, 16 * k).unwrap();
        let gate = n.units(width * hidden);
        let (narrow, wide) = (s.upload(&bf16(&gate)), s.upload(&gate));
        let gate_bias = s.upload(&n.units(width));
        for (tokens, float) in
            [(1, Float::Bf16), (5, Float::F32), (16, Float::Bf16), (1, Float::F32)]
        {
            let x = s.upload(&bf16(&n.units(tokens * hidden)));
            let x = Rows::new(x.view(), Float::Bf16, tokens, hidden).unwrap();
            let gate = match float {
                Float::F32 => Rows::new(wide.view(), float, width, hidden).unwrap(),
                _ => Rows::new(narrow.view(), float, width, hidden).unwrap(),
            };
            let bias = (tokens > 1).then(|| gate_bias.view());
            let place = format!("{format:?}, {options:?}, {tokens} tokens");
            bits_of_the_verbs(&s, (&few, &mut work), &router, x, (gate, bias), &place);
        }
    }
}

/// Gates whose logits are their bias: where rounding decides, a number is none, or rows differ in nothing, the launch
/// chooses as the router does.
#[test]
fn a_gate_in_front_chooses_as_the_router_does_where_scores_are_equal() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(38);
    let (experts, hidden) = (130, 512);
    let host =
        Experts::new(&s, &mut n, BF16, [experts, hidden, 256], true, Activation::Silu, false);
    let weight_from = WeightFrom::SoftmaxChosen;
    let softmax = RouterOptions::softmax(experts, 8, Renormalise::Sum(0.0));
    let logits = RouterOptions { score: Score::Logits, weight_from, ..softmax };
    let spread = |e: usize| e as f32 * -0.01 - 1.0;
    let base: Vec<f32> = (0..experts).map(|e| spread(e * 37 % experts)).collect();
    let with = |changes: &[(usize, f32)]| {
        let mut bias = base.clone();
        changes.iter().for_each(|(e, value)| bias[*e] = *value);
        bias
    };
    let next = |v: f32| f32::from_bits(v.to_bits() + 1);
    let mut border: Vec<(usize, f32)> = (20..27).map(|e| (e, e as f32 * 0.1)).collect();
    border.extend([(2, -0.01), (100, f32::from_bits((-0.01f32).to_bits() - 1))]);
    let gates = [
        with(&[]),
        // the later one is larger by an ulp: no score tells them apart, a logit does
        with(&[(5, 0.01), (9, next(0.01))]),
        // at the border between what is chosen and what is not
        with(&border),
        with(&[(3, 0.25), (120, 0.25), (64, 0.25)]),
        with(&[(3, 0.0), (120, -0.0)]),
        with(&[(1, f32::NEG_INFINITY), (4, f32::NEG_INFINITY)]),
        // scores that are no normal numbers
        with(&[(6, 95.0), (77, 96.0), (78, 200.0)]),
        vec![0.5; experts],
    ];
    for options in [softmax, logits] {
        let router = Router::new(&s.modules, options, RouterTensors::default()).unwrap();
        let few = FewExperts::new(&s.modules, &s.stream, host.weights()).unwrap();
        let few = few.with_gate(&s.modules, &router).unwrap();
        let mut work = few.workspace(&s.stream, 16 * options.top_k).unwrap();
        let weight = s.upload(&vec![0u16; experts * hidden]);
        for (i, bias) in gates.iter().enumerate() {
            for tokens in [1, 3, 16] {
                let x = s.upload(&bf16(&n.units(tokens * hidden)));
                let x = Rows::new(x.view(), Float::Bf16, tokens, hidden).unwrap();
                let gate = Rows::new(weight.view(), Float::Bf16, experts, hidden).unwrap();
                let bias = s.upload(bias);
                let place = format!("gate {i}, {:?}, {tokens} tokens", options.score);
                let gate = (gate, Some(bias.view()));
                bits_of_the_verbs(&s, (&few, &mut work), &router, x, gate, &place);
            }
        }
    }
}

/// Logits, ids, weights and outputs behind a gate, twice, and those of the verbs.
fn bits_of_the_verbs(
    s: &Setup,
    (few, work): (&FewExperts, &mut FewWorkspace),
    router: &Router,
    x: Rows<'_>,
    (gate, bias): (Rows<'_>, Option<View<'_, f32>>),
    place: &str,
) {
    let (tokens, hidden, width) = (x.rows(), x.cols(), gate.rows());
    let RouterOptions { top_k: k, shared: beside, .. } = *router.options();
    let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    let mut all = Vec::new();
    for in_front in [false, true, true] {
        let (mut logits, mut ids) = (s.buffer::<f32>(tokens * width), s.buffer(tokens * k));
        let (mut weights, mut shared) =
            (s.buffer::<f32>(tokens * k), s.buffer::<f32>(tokens * beside));
        let mut out = s.buffer::<f32>(tokens * hidden);
        let mut rows = RowsMut::new(out.view_mut(), Float::F32, tokens, hidden).unwrap();
        let mut routing = RoutingMut {
            ids: ids.view_mut(),
            weights: weights.view_mut(),
            shared_weights: shared.view_mut(),
        };
        if in_front {
            assert!(few.takes_gate(tokens, &x, &gate, router));
            let (logits, fault) = (logits.view_mut(), &fault);
            let gate = FewGate { weight: gate, bias, router, logits, routing, fault };
            let batch = (x, 0.7, fault);
            few.forward_gated(&s.stream, gate, batch, work, &mut rows).unwrap();
        } else {
            let mut to = RowsMut::new(logits.view_mut(), Float::F32, tokens, width).unwrap();
            s.verbs.linear(&s.stream, x, gate, bias, &mut to).unwrap();
            router.route(&s.stream, to.as_rows(), None, &mut routing, &fault).unwrap();
            let (ids, weights) = (ids.view(), weights.view());
            let batch = FewBatch { x, ids, weights, factor: 0.7, fault: &fault };
            few.forward(&s.stream, &batch, None, work, &mut rows).unwrap();
        }
        fault.check(&s.stream).unwrap();
        let floats = [logits.view(), weights.view(), shared.view(), out.view()];
        let floats = floats.map(|view| s.download(view));
        // a logit may mask its expert
        assert!(floats[1..].iter().flatten().all(|v| v.is_finite()));
        all.push((s.download::<u32>(ids.view()), floats));
    }
    assert_eq!(all[0].0, all[1].0, "{place}: ids");
    for (i, what) in ["logits", "weights", "shared weights", "output"].iter().enumerate() {
        assert_eq!(all[0].1[i], all[1].1[i], "{place}: {what}");
    }
    assert_eq!(all[1], all[2], "{place}: again");
}

#[test]
fn many_tokens_are_within_the_bound_of_bf16() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(31);
    let batches = [(1, 3), (40, 2), (130, 3), (1000, 2)];
    // the last one has several tiles for each block, some of them with rows for one team only
    for (hidden, inner) in [(256, 384), (200, 136), (512, 3072)] {
        for (activation, bias) in [(Activation::Silu, false), (GPT_OSS, true)] {
            let dims = [7, hidden, inner];
            let host = Experts::new(&s, &mut n, BF16, dims, true, activation, bias);
            let mut pass = Pass::new(&s, host.weights(), 2000, true).unwrap();
            check(&s, &host, &mut pass, &batches, 1e-5, &|row| row, &mut n);
        }
    }
}

#[test]
fn many_tokens_of_four_bits_are_within_the_bound_of_bf16() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(37);
    let batches = [(1, 3), (40, 2), (130, 3), (1000, 2)];
    // the last ones have several tiles for each block; sizes that leave the last block groups without weights
    for (format, hidden, inner) in [
        (MXFP4, 320, 192),
        (MXFP4, 512, 3072),
        (INT4, 256, 384),
        (INT4, 640, 128),
        (INT4, 512, 3072),
    ] {
        for (activation, bias) in [(Activation::Silu, false), (GPT_OSS, true)] {
            let dims = [7, hidden, inner];
            let host = Experts::new(&s, &mut n, format, dims, true, activation, bias);
            let mut pass = Pass::new(&s, host.weights(), 2000, true).unwrap();
            println!("{format:?} {dims:?} {activation:?}");
            check(&s, &host, &mut pass, &batches, 1e-5, &|row| row, &mut n);
        }
    }
}

#[test]
fn many_tokens_quantise_rows_as_fp8_checkpoints_do() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(32);
    for (hidden, inner) in [(256, 384), (640, 128), (512, 3072)] {
        let dims = [7, hidden, inner];
        let host = Experts::new(&s, &mut n, FP8, dims, true, Activation::Silu, false);
        let mut pass = Pass::new(&s, host.weights(), 2000, true).unwrap();
        let batches = [(1, 3), (40, 2), (130, 3), (1000, 2)];
        check(&s, &host, &mut pass, &batches, 1e-4, &quantised, &mut n);
    }
}

/// Outputs that go to homes of their own, of some slots each, are those that stay, bit by bit.
#[test]
fn outputs_of_slots_go_home_as_they_are() {
    let Some(s) = setup() else { return };
    if s.gpu().properties().capability != (9, 0) {
        return;
    }
    let (experts, hidden, inner, tokens, top_k, homes) = (7, 640, 256, 60, 3, 4);
    let slots = tokens * top_k;
    for format in [BF16, FP8, INT4, MXFP4] {
        let mut n = Numbers(13);
        let dims = [experts, hidden, inner];
        let host = Experts::new(&s, &mut n, format, dims, true, Activation::Silu, false);
        let mut pass = Pass::new(&s, host.weights(), slots, true).unwrap();
        let (x, mut ids, weights) = batch(&mut n, tokens, hidden, experts, top_k);
        ids.iter_mut().step_by(5).for_each(|id| *id = u32::MAX);
        pass.load(&s, &bf16(&x), &ids, &weights);
        pass.run(&s, tokens, top_k).unwrap();
        let Kernel::Many(kernel, work) = &mut pass.kernel else { unreachable!() };
        let of = kernel.outputs(work);
        // SAFETY: the workspace's own memory, which nothing writes to.
        let raw = |address: u64, bytes: usize| unsafe {
            s.download(View::<u8>::from_raw(address, bytes))
        };
        let values = raw(of.values, slots * of.value_bytes);
        let scales = raw(of.scales, slots * of.scale_bytes);
        let each = slots / homes;
        let scales_at = each * of.value_bytes;
        let memory: Vec<Buffer<u8>> =
            (0..homes).map(|_| s.buffer(each * (of.value_bytes + of.scale_bytes))).collect();
        let addresses: Vec<u64> = memory.iter().map(|home| home.view().address()).collect();
        let addresses = s.upload(&addresses);
        let to = SlotHomes { addresses: addresses.view(), slots: each, scales_at };
        let rows = pass.x.view().part(0..tokens * hidden);
        let rows = Rows::new(rows, Float::Bf16, tokens, hidden).unwrap();
        // SAFETY: there is room for all slots.
        unsafe { kernel.slots_to(&s.stream, rows, &pass.plan, work, to) }.unwrap();
        for slot in (0..slots).filter(|slot| (ids[*slot] as usize) < experts) {
            let home = s.download(memory[slot / each].view());
            let at = slot % each;
            let got = &home[at * of.value_bytes..][..of.value_bytes];
            assert_eq!(got, &values[slot * of.value_bytes..][..of.value_bytes], "slot {slot}");
            let got = &home[scales_at + at * of.scale_bytes..][..of.scale_bytes];
            assert_eq!(got, &scales[slot * of.scale_bytes..][..of.scale_bytes], "slot {slot}");
        }
    }
}

#[test]
fn what_has_no_kernel_is_refused_with_the_reason() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(33);
    let mut refused = |format, dims, gated, many| {
        let host = Experts::new(&s, &mut n, format, dims, gated, Activation::Silu, false);
        match Pass::new(&s, host.weights(), 8, many).err() {
            Some(Error::Input { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let f32 = plain(Element::F32);
    assert!(refused(f32, [2, 64, 64], true, false).contains("no kernel for F32"));
    assert!(refused(BF16, [2, 64, 64], false, false).contains("without a gate"));
    assert!(refused(BF16, [2, 96, 64], true, false).contains("not multiples of 64"));
    assert!(refused(INT4, [2, 192, 128], true, true).contains("no multiple of 128"));
    assert!(refused(FP8, [2, 192, 128], true, true).contains("no multiple of 128"));
}

#[test]
fn an_output_that_overflows_is_a_fault() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(34);
    for many in [false, true] {
        let host = Experts::new(&s, &mut n, BF16, [2, 64, 64], true, Activation::Silu, false);
        let mut pass = Pass::new(&s, host.weights(), 8, many).unwrap();
        let mut x = bf16(&n.units(3 * 64));
        x[64] = half::bf16::MAX.to_bits();
        x[65] = half::bf16::INFINITY.to_bits();
        pass.load(&s, &x, &[0, 1, 0], &[1.0; 3]);
        pass.run(&s, 3, 1).unwrap();
        match pass.fault.check(&s.stream) {
            Err(Error::Fault(fault)) => assert_eq!(fault.row(), 1),
            other => panic!("{other:?}"),
        }
    }
}
