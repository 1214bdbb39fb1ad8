//! Experts of every stored format against float64 on the host, through the whole pass: route given,
//! plan, both products, combine; and as a graph that is replayed with other rows and routing.

mod common;

use common::experts::{Experts, Format, batch, plain, scaled};
use common::{Numbers, Setup, nmse, setup};
use moe_cuda::weights::{Activation, Element, ScaleType};
use moe_cuda::{Buffer, ExpertWeights, FaultWord, Float, GroupedExperts, Plan, Rows, RowsMut};

const FORMATS: &[Format] = &[
    plain(Element::F32),
    plain(Element::F16),
    plain(Element::Bf16),
    scaled(Element::E4m3, ScaleType::F32, (0, 0)),
    scaled(Element::E4m3, ScaleType::F32, (1, 0)),
    scaled(Element::E4m3, ScaleType::F32, (128, 128)),
    scaled(Element::E4m3, ScaleType::E8m0, (1, 32)),
    scaled(Element::E5m2, ScaleType::F16, (1, 0)),
    scaled(Element::Int8, ScaleType::F32, (1, 0)),
    Format { zeros: true, ..scaled(Element::Uint8, ScaleType::F16, (1, 32)) },
    scaled(Element::Uint4, ScaleType::Bf16, (1, 32)),
    Format { zeros: true, ..scaled(Element::Uint4, ScaleType::F16, (1, 64)) },
    scaled(Element::E2m1, ScaleType::E8m0, (1, 32)),
    Format { global: true, ..scaled(Element::E2m1, ScaleType::E4m3, (1, 16)) },
];

/// Buffers of a pass of up to `tokens` tokens.
struct Pass {
    x: Buffer<f32>,
    ids: Buffer<u32>,
    weights: Buffer<f32>,
    h: Buffer<f32>,
    y: Buffer<f32>,
    out: Buffer<f32>,
    plan: Plan,
    fault: FaultWord,
    top_k: usize,
}

impl Pass {
    fn new(s: &Setup, tokens: usize, top_k: usize, w: &ExpertWeights) -> Self {
        let slots = tokens * top_k;
        Self {
            x: s.buffer(tokens * w.hidden()),
            ids: s.buffer(slots),
            weights: s.buffer(slots),
            h: s.buffer(slots * w.intermediate()),
            y: s.buffer(slots * w.hidden()),
            out: s.buffer(tokens * w.hidden()),
            plan: Plan::new(s.gpu(), slots, w.up.experts, GroupedExperts::TILE).unwrap(),
            fault: FaultWord::new(s.gpu(), &s.stream).unwrap(),
            top_k,
        }
    }

    /// What lies in the buffers; nothing waits.
    fn run(
        &mut self,
        s: &Setup,
        experts: &GroupedExperts,
        tokens: usize,
        on_input: bool,
    ) -> moe_cuda::Result<()> {
        let w = experts.weights();
        let (hidden, inner, slots) = (w.hidden(), w.intermediate(), tokens * self.top_k);
        let stream = &s.stream;
        let ids = self.ids.view().part(0..slots);
        let weights = self.weights.view().part(0..slots);
        s.verbs.plan(stream, ids, self.top_k, &mut self.plan)?;
        let x = Rows::new(self.x.view().part(0..tokens * hidden), Float::F32, tokens, hidden)?;
        let mut h =
            RowsMut::new(self.h.view_mut().part(0..slots * inner), Float::F32, slots, inner)?;
        let mut y =
            RowsMut::new(self.y.view_mut().part(0..slots * hidden), Float::F32, slots, hidden)?;
        experts.first(stream, x, &self.plan, on_input.then_some(weights), &mut h)?;
        experts.second(stream, h.as_rows(), &self.plan, &mut y)?;
        let out = self.out.view_mut().part(0..tokens * hidden);
        let mut out = RowsMut::new(out, Float::F32, tokens, hidden)?;
        let after = (!on_input).then_some(weights);
        s.verbs.combine(stream, y.as_rows(), ids, after, w.up.experts, 1.0, &mut out, &self.fault)
    }
}

fn load(s: &Setup, pass: &mut Pass, batch: &(Vec<f32>, Vec<u32>, Vec<f32>)) {
    let (x, ids, weights) = batch;
    s.stream.copy_in(x, pass.x.view_mut().part(0..x.len())).unwrap();
    s.stream.copy_in(ids, pass.ids.view_mut().part(0..ids.len())).unwrap();
    s.stream.copy_in(weights, pass.weights.view_mut().part(0..ids.len())).unwrap();
}

#[test]
fn every_format_is_within_the_bound_of_f32() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(20);
    let (experts, hidden, inner, top_k, tokens) = (5, 192, 160, 3, 41);
    for &format in FORMATS {
        for bias in [false, true] {
            let dims = [experts, hidden, inner];
            let host = Experts::new(&s, &mut n, format, dims, true, Activation::Silu, bias);
            let grouped = GroupedExperts::new(&s.modules, host.weights()).unwrap();
            let mut pass = Pass::new(&s, tokens, top_k, grouped.weights());
            let data = batch(&mut n, tokens, hidden, experts, top_k);
            load(&s, &mut pass, &data);
            pass.run(&s, &grouped, tokens, bias).unwrap();
            pass.fault.check(&s.stream).unwrap();
            let got = s.download(pass.out.view());
            let want: Vec<f64> = (0..tokens)
                .flat_map(|t| {
                    let slots = t * top_k..(t + 1) * top_k;
                    let x = &data.0[t * hidden..][..hidden];
                    host.token(x, &data.1[slots.clone()], &data.2[slots], bias)
                })
                .collect();
            let error = nmse(&got, &want);
            assert!(error < 1e-11, "{format:?}, bias {bias}: {error:e}");
        }
    }
}

#[test]
fn every_activation_with_and_without_a_gate() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(21);
    let (experts, hidden, inner, top_k, tokens) = (3, 64, 96, 2, 9);
    for activation in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Relu2,
        Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 0.7 },
        Activation::SwigluStep { limit: 0.3 },
        Activation::Situ { beta: 0.8, lambda: Some(0.6) },
        Activation::Situ { beta: 0.8, lambda: None },
    ] {
        for gated in [true, false] {
            let dims = [experts, hidden, inner];
            let format = plain(Element::F32);
            let host = Experts::new(&s, &mut n, format, dims, gated, activation, true);
            let grouped = GroupedExperts::new(&s.modules, host.weights()).unwrap();
            let mut pass = Pass::new(&s, tokens, top_k, grouped.weights());
            let data = batch(&mut n, tokens, hidden, experts, top_k);
            load(&s, &mut pass, &data);
            pass.run(&s, &grouped, tokens, false).unwrap();
            let got = s.download(pass.out.view());
            let want: Vec<f64> = (0..tokens)
                .flat_map(|t| {
                    let slots = t * top_k..(t + 1) * top_k;
                    let x = &data.0[t * hidden..][..hidden];
                    host.token(x, &data.1[slots.clone()], &data.2[slots], false)
                })
                .collect();
            let error = nmse(&got, &want);
            assert!(error < 1e-11, "{activation:?}, gated {gated}: {error:e}");
        }
    }
}

#[test]
fn a_token_is_the_same_bit_by_bit_in_any_batch_and_in_a_replayed_graph() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(22);
    let (experts, hidden, inner, top_k, tokens) = (6, 128, 96, 2, 130);
    let format = scaled(Element::Uint4, ScaleType::Bf16, (1, 32));
    let host =
        Experts::new(&s, &mut n, format, [experts, hidden, inner], true, Activation::Silu, false);
    let grouped = GroupedExperts::new(&s.modules, host.weights()).unwrap();
    let mut pass = Pass::new(&s, tokens, top_k, grouped.weights());
    let batches: Vec<_> = (0..3).map(|_| batch(&mut n, tokens, hidden, experts, top_k)).collect();
    let all: Vec<Vec<f32>> = batches
        .iter()
        .map(|data| {
            load(&s, &mut pass, data);
            pass.run(&s, &grouped, tokens, false).unwrap();
            s.download(pass.out.view())
        })
        .collect();
    // captured with the rows of the first batch, replayed with those of the others
    load(&s, &mut pass, &batches[0]);
    let graph = s.stream.capture(|| pass.run(&s, &grouped, tokens, false)).unwrap();
    for (data, want) in batches.iter().zip(&all) {
        load(&s, &mut pass, data);
        s.stream.fill(pass.out.view_mut(), 0xff).unwrap();
        // SAFETY: the buffers of the pass live.
        unsafe { s.stream.replay(&graph) }.unwrap();
        assert_eq!(&s.download(pass.out.view()), want);
    }
    // single tokens
    for t in [0, 64, 129] {
        let (x, ids, weights) = &batches[1];
        let one = (
            x[t * hidden..][..hidden].to_vec(),
            ids[t * top_k..][..top_k].to_vec(),
            weights[t * top_k..][..top_k].to_vec(),
        );
        load(&s, &mut pass, &one);
        pass.run(&s, &grouped, 1, false).unwrap();
        let got = s.download(pass.out.view().part(0..hidden));
        assert_eq!(got, all[1][t * hidden..][..hidden]);
    }
}
