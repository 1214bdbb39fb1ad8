//! Experts of every stored format against float64 on the host, through the whole pass: route given,
//! plan, both products, combine; and as a graph that is replayed with other rows and routing.

mod common;

use std::sync::Arc;

use common::{Numbers, Setup, bf16, bytes, f16, nmse, setup};
use moe_cuda::experts::{Activation, Bytes, Element, ScaleType, Scales, Stored};
use moe_cuda::{Buffer, ExpertWeights, FaultWord, Float, GroupedExperts, Plan, Rows, RowsMut};
use moe_kernels::numerics::{e2m1, e4m3, e5m2, e8m0};

/// One projection: on the device as stored, and its values on the host.
struct Matrix {
    stored: Stored,
    values: Vec<f64>,
    bias: Vec<f64>,
}

/// How a random matrix is stored.
#[derive(Clone, Copy, Debug)]
struct Format {
    element: Element,
    scale: Option<ScaleType>,
    /// Rows and columns of a block; 0: all.
    block: (usize, usize),
    zeros: bool,
    global: bool,
}

const fn plain(element: Element) -> Format {
    Format { element, scale: None, block: (0, 0), zeros: false, global: false }
}

const fn scaled(element: Element, scale: ScaleType, block: (usize, usize)) -> Format {
    Format { element, scale: Some(scale), block, zeros: false, global: false }
}

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

fn matrix(s: &Setup, n: &mut Numbers, f: Format, shape: [usize; 3], bias: bool) -> Matrix {
    let [experts, rows, cols] = shape;
    let count = experts * rows * cols;
    let spread = 1.5 / (cols as f32).sqrt();
    let (codes, mut values): (Vec<u8>, Vec<f64>) = match f.element {
        Element::F32 => {
            let v: Vec<f32> = n.units(count).iter().map(|x| x * spread).collect();
            (bytes(&v), v.iter().map(|&x| x.into()).collect())
        }
        Element::F16 => {
            let v = f16(&n.units(count).iter().map(|x| x * spread).collect::<Vec<_>>());
            let wide = v.iter().map(|&b| half::f16::from_bits(b).into()).collect();
            (bytes(&v), wide)
        }
        Element::Bf16 => {
            let v = bf16(&n.units(count).iter().map(|x| x * spread).collect::<Vec<_>>());
            let wide = v.iter().map(|&b| half::bf16::from_bits(b).into()).collect();
            (bytes(&v), wide)
        }
        Element::E4m3 | Element::E5m2 => {
            let decode = if f.element == Element::E4m3 { e4m3::decode } else { e5m2::decode };
            let codes: Vec<u8> = (0..count)
                .map(|_| {
                    loop {
                        let code = n.bits() as u8;
                        if decode(code).is_finite() && decode(code).abs() < 500.0 {
                            break code;
                        }
                    }
                })
                .collect();
            let values = codes.iter().map(|&c| decode(c).into()).collect();
            (codes, values)
        }
        Element::Int8 | Element::Uint8 => {
            let codes: Vec<u8> = (0..count).map(|_| n.bits() as u8).collect();
            let value =
                |c: u8| if f.element == Element::Int8 { f64::from(c as i8) } else { c.into() };
            let values = codes.iter().map(|&c| value(c)).collect();
            (codes, values)
        }
        Element::Uint4 | Element::E2m1 => {
            let codes: Vec<u8> = (0..count / 2).map(|_| n.bits() as u8).collect();
            let value = |c: u8| {
                if f.element == Element::E2m1 { e2m1::decode(c).into() } else { f64::from(c) }
            };
            let values = codes.iter().flat_map(|&c| [value(c & 15), value(c >> 4)]).collect();
            (codes, values)
        }
    };
    let block = (
        if f.block.0 == 0 { rows } else { f.block.0 },
        if f.block.1 == 0 { cols } else { f.block.1 },
    );
    let per_row = cols.div_ceil(block.1);
    let per_expert = rows.div_ceil(block.0) * per_row;
    let mut zero = if f.element == Element::Uint4 { 8.0 } else { 0.0 };
    // values of scales, so that weights are about as large as `spread`
    let largest = match f.element {
        Element::E4m3 | Element::E5m2 => 200.0,
        Element::Int8 | Element::Uint8 => 100.0,
        _ => 6.0,
    };
    let zeros: Option<Vec<u8>> = f.zeros.then(|| {
        let most = if f.element == Element::Uint4 { 16 } else { 256 };
        zero = 0.0;
        (0..experts * per_expert).map(|_| n.below(most) as u8).collect()
    });
    let global: Option<Vec<f32>> =
        f.global.then(|| (0..experts).map(|_| 0.001 * (1.0 + n.unit().abs())).collect());
    let target = spread / largest;
    let scales: Option<(Vec<u8>, Vec<f64>)> = f.scale.map(|scale| {
        let v: Vec<f32> =
            (0..experts * per_expert).map(|_| target * (1.0 + 0.5 * n.unit())).collect();
        match scale {
            ScaleType::F32 => (bytes(&v), v.iter().map(|&x| x.into()).collect()),
            ScaleType::F16 => {
                let v = f16(&v);
                (bytes(&v), v.iter().map(|&b| half::f16::from_bits(b).into()).collect())
            }
            ScaleType::Bf16 => {
                let v = bf16(&v);
                (bytes(&v), v.iter().map(|&b| half::bf16::from_bits(b).into()).collect())
            }
            ScaleType::E8m0 => {
                let v: Vec<u8> = v.iter().map(|&x| e8m0::encode(x)).collect();
                let values = v.iter().map(|&c| e8m0::decode(c).into()).collect();
                (v, values)
            }
            ScaleType::E4m3 => {
                let v: Vec<u8> = v.iter().map(|&x| e4m3::encode(x / 0.001)).collect();
                let values = v.iter().map(|&c| e4m3::decode(c).into()).collect();
                (v, values)
            }
        }
    });
    for (i, value) in values.iter_mut().enumerate() {
        let (e, r, c) = (i / (rows * cols), i / cols % rows, i % cols);
        let at = e * per_expert + r / block.0 * per_row + c / block.1;
        let zero = zeros.as_ref().map_or(f64::from(zero), |z| f64::from(z[at]));
        let scale = scales.as_ref().map_or(1.0, |(_, v)| v[at]);
        let global = global.as_ref().map_or(1.0, |g| f64::from(g[e]));
        // a weight is its exact value rounded once to f32
        *value = f64::from(((*value - zero) * scale * global) as f32);
    }
    let bias_values: Vec<f32> = if bias { n.units(experts * rows) } else { Vec::new() };
    let upload = |b: &[u8]| Bytes::new(s.upload(b));
    let stored = Stored {
        scales: scales.as_ref().map(|(b, _)| Scales {
            scale: f.scale.unwrap(),
            bytes: upload(b),
            rows: block.0,
            cols: block.1,
            expert_bytes: b.len() / experts,
        }),
        zero,
        zeros: zeros.as_deref().map(upload),
        global: global.as_deref().map(|g| Arc::new(s.upload(g))),
        bias: bias.then(|| Arc::new(s.upload(&bias_values))),
        ..Stored::floats(f.element, upload(&codes), experts, rows, cols)
    };
    Matrix { stored, values, bias: bias_values.iter().map(|&b| b.into()).collect() }
}

/// Experts with their values on the host.
struct Experts {
    gate: Option<Matrix>,
    up: Matrix,
    down: Matrix,
    activation: Activation,
}

impl Experts {
    fn new(
        s: &Setup,
        n: &mut Numbers,
        f: Format,
        dims: [usize; 3],
        gated: bool,
        activation: Activation,
        bias: bool,
    ) -> Self {
        let [experts, hidden, intermediate] = dims;
        let up = [experts, intermediate, hidden];
        Self {
            gate: gated.then(|| matrix(s, n, f, up, bias)),
            up: matrix(s, n, f, up, bias),
            down: matrix(s, n, f, [experts, hidden, intermediate], bias),
            activation,
        }
    }

    fn weights(&self) -> ExpertWeights {
        ExpertWeights {
            gate: self.gate.as_ref().map(|m| m.stored.clone()),
            up: self.up.stored.clone(),
            down: self.down.stored.clone(),
            activation: self.activation,
        }
    }

    /// Σ_j w_j · expert_j(x · factor_j) of one token.
    fn token(&self, x: &[f32], ids: &[u32], weights: &[f32], on_input: bool) -> Vec<f64> {
        let mut out = vec![0.0; x.len()];
        for (&id, &w) in ids.iter().zip(weights) {
            let e = id as usize;
            if e >= self.up.stored.experts {
                continue;
            }
            // the product of row and weight is rounded to f32
            let x: Vec<f64> =
                x.iter().map(|&v| if on_input { (v * w).into() } else { v.into() }).collect();
            let product = |m: &Matrix, x: &[f64]| -> Vec<f64> {
                let (rows, cols) = (m.stored.rows, m.stored.cols);
                (0..rows)
                    .map(|r| {
                        let row = &m.values[(e * rows + r) * cols..][..cols];
                        let bias = m.bias.get(e * rows + r).copied().unwrap_or(0.0);
                        row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias
                    })
                    .collect()
            };
            let up = product(&self.up, &x);
            let h: Vec<f64> = match &self.gate {
                Some(gate) => {
                    let g = product(gate, &x);
                    g.iter()
                        .zip(&up)
                        .map(|(&g, &u)| activate(self.activation, g, Some(u)))
                        .collect()
                }
                None => up.iter().map(|&u| activate(self.activation, u, None)).collect(),
            };
            let w = if on_input { 1.0 } else { f64::from(w) };
            out.iter_mut().zip(product(&self.down, &h)).for_each(|(o, y)| *o += w * y);
        }
        out
    }
}

fn activate(activation: Activation, g: f64, u: Option<f64>) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let times = |v: f64| u.map_or(v, |u| v * u);
    match activation {
        Activation::Silu => times(g * sigmoid(g)),
        Activation::Gelu => times(g * normal(g)),
        Activation::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
            times(0.5 * g * (1.0 + z.tanh()))
        }
        Activation::Relu => times(g.max(0.0)),
        Activation::Relu2 => times(g.max(0.0).powi(2)),
        Activation::ClampedSwiglu { alpha, beta, limit } => {
            let (alpha, beta, limit) = (f64::from(alpha), f64::from(beta), f64::from(limit));
            let g = g.min(limit);
            let v = g * sigmoid(alpha * g);
            u.map_or(v, |u| v * (u.clamp(-limit, limit) + beta))
        }
        Activation::SwigluStep { limit } => {
            let limit = f64::from(limit);
            let v = (g * sigmoid(g)).min(limit);
            u.map_or(v, |u| v * u.clamp(-limit, limit))
        }
        Activation::Situ { beta, lambda } => {
            let beta = f64::from(beta);
            let v = beta * (g / beta).tanh() * sigmoid(g);
            u.map_or(v, |u| v * lambda.map_or(u, |l| f64::from(l) * (u / f64::from(l)).tanh()))
        }
    }
}

/// The normal distribution: Simpson's rule over its density.
fn normal(x: f64) -> f64 {
    let steps = 400;
    let width = x / f64::from(steps);
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let sum: f64 = (0..steps)
        .map(|i| {
            let t = width * f64::from(i);
            density(t) + 4.0 * density(t + width / 2.0) + density(t + width)
        })
        .sum();
    0.5 + sum * width / 6.0
}

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

/// Rows and routing of a batch; some slots have no expert.
fn batch(
    n: &mut Numbers,
    tokens: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let x = n.units(tokens * hidden);
    let ids = (0..tokens).flat_map(|_| n.distinct(top_k, experts + 1)).collect();
    let weights = n.units(tokens * top_k).iter().map(|w| w.abs() + 0.1).collect();
    (x, ids, weights)
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
