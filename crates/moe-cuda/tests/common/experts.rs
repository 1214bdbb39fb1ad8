//! Random experts of any stored format, with their values on the host, and one token through them in
//! float64.

use std::sync::Arc;

use moe_cuda::ExpertWeights;
use moe_cuda::weights::{Activation, Bytes, Element, ScaleType, Scales, Stored};
use moe_kernels::numerics::{e2m1, e4m3, e5m2, e8m0};

use super::{Numbers, Setup, bf16, bytes, f16};

/// One projection: on the device as stored, and its values on the host.
pub struct Matrix {
    pub stored: Stored,
    pub values: Vec<f64>,
    pub bias: Vec<f64>,
}

/// How a random matrix is stored.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    pub element: Element,
    pub scale: Option<ScaleType>,
    /// Rows and columns of a block; 0: all.
    pub block: (usize, usize),
    pub zeros: bool,
    pub global: bool,
}

pub const fn plain(element: Element) -> Format {
    Format { element, scale: None, block: (0, 0), zeros: false, global: false }
}

pub const fn scaled(element: Element, scale: ScaleType, block: (usize, usize)) -> Format {
    Format { element, scale: Some(scale), block, zeros: false, global: false }
}

pub fn matrix(s: &Setup, n: &mut Numbers, f: Format, shape: [usize; 3], bias: bool) -> Matrix {
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
        Element::E4m3 => {
            // as quantised weights are: evenly over the range, not over the codes
            let codes: Vec<u8> = (0..count).map(|_| e4m3::encode(448.0 * n.unit())).collect();
            let values = codes.iter().map(|&c| e4m3::decode(c).into()).collect();
            (codes, values)
        }
        Element::E5m2 => {
            let codes: Vec<u8> = (0..count).map(|_| e5m2::encode(448.0 * n.unit())).collect();
            let values = codes.iter().map(|&c| e5m2::decode(c).into()).collect();
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
pub struct Experts {
    pub gate: Option<Matrix>,
    pub up: Matrix,
    pub down: Matrix,
    pub activation: Activation,
}

impl Experts {
    pub fn new(
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

    pub fn weights(&self) -> ExpertWeights {
        ExpertWeights {
            gate: self.gate.as_ref().map(|m| m.stored.clone()),
            up: self.up.stored.clone(),
            down: self.down.stored.clone(),
            activation: self.activation,
        }
    }

    /// Σ_j w_j · expert_j(x · factor_j) of one token.
    pub fn token(&self, x: &[f32], ids: &[u32], weights: &[f32], on_input: bool) -> Vec<f64> {
        self.token_with(x, ids, weights, on_input, &|row| row)
    }

    /// As [`Self::token`], with what is done to rows before either product.
    pub fn token_with(
        &self,
        x: &[f32],
        ids: &[u32],
        weights: &[f32],
        on_input: bool,
        rows: &dyn Fn(Vec<f64>) -> Vec<f64>,
    ) -> Vec<f64> {
        let mut out = vec![0.0; x.len()];
        for (&id, &w) in ids.iter().zip(weights) {
            let e = id as usize;
            if e >= self.up.stored.experts {
                continue;
            }
            // the product of row and weight is rounded to f32
            let x: Vec<f64> =
                x.iter().map(|&v| if on_input { (v * w).into() } else { v.into() }).collect();
            let x = rows(x);
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
            let h = rows(h);
            let w = if on_input { 1.0 } else { f64::from(w) };
            out.iter_mut().zip(product(&self.down, &h)).for_each(|(o, y)| *o += w * y);
        }
        out
    }
}

pub fn activate(activation: Activation, g: f64, u: Option<f64>) -> f64 {
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
pub fn normal(x: f64) -> f64 {
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

/// Rows and routing of a batch; some slots have no expert.
pub fn batch(
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
