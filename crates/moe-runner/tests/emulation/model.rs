//! A scalar model of the emulated arithmetic, from the definitions alone: its own number formats, its
//! own roundings, its own loops.

use std::sync::LazyLock;

/// Values of a small float's non-negative codes, in order.
fn table(exponent: i32, mantissa: i32, codes: u32) -> Vec<f64> {
    let bias = (1 << (exponent - 1)) - 1;
    let value = |code: u32| {
        let (e, m) = ((code >> mantissa) as i32, f64::from(code & ((1 << mantissa) - 1)));
        let fraction = m / f64::from(1 << mantissa);
        match e {
            0 => fraction * 2f64.powi(1 - bias),
            _ => (1.0 + fraction) * 2f64.powi(e - bias),
        }
    };
    (0..codes).map(value).collect()
}

/// The small floats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Small {
    E2m1,
    E2m3,
    E3m2,
    E4m3,
}

impl Small {
    fn table(self) -> &'static [f64] {
        static TABLES: LazyLock<[Vec<f64>; 4]> =
            LazyLock::new(|| [table(2, 1, 8), table(2, 3, 32), table(3, 2, 32), table(4, 3, 127)]);
        &TABLES[self as usize]
    }

    /// Bits of the mantissa, and the exponent of the largest value.
    fn shape(self) -> (i32, i32) {
        match self {
            Small::E2m1 => (1, 2),
            Small::E2m3 => (3, 2),
            Small::E3m2 => (2, 4),
            Small::E4m3 => (3, 8),
        }
    }

    /// Value of a code with its sign in the highest of `bits`.
    pub(crate) fn value(self, code: u8) -> f32 {
        let table = self.table();
        let half = match self {
            Small::E2m1 => 8,
            Small::E2m3 | Small::E3m2 => 32,
            Small::E4m3 => 128,
        };
        let magnitude = table[usize::from(code) % half] as f32;
        if usize::from(code) >= half { -magnitude } else { magnitude }
    }

    /// The nearest value; in the middle the one with the even code; at most the largest.
    pub(crate) fn nearest(self, x: f32) -> f32 {
        let (table, magnitude) = (self.table(), f64::from(x).abs());
        let mut best = 0;
        for code in 1..table.len() {
            let (new, old) = (table[code] - magnitude, table[best] - magnitude);
            if new.abs() < old.abs() || (new.abs() == old.abs() && code % 2 == 0) {
                best = code;
            }
        }
        (table[best] as f32).copysign(x)
    }
}

/// The activations' dtype.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum T {
    F32,
    Bf16,
    F16,
}

impl T {
    /// Rounded to nearest, ties to even.
    pub(crate) fn rnd(self, x: f32) -> f32 {
        let (mantissa, smallest, largest) = match self {
            T::F32 => return x,
            T::Bf16 => (7, -126, f64::from(f32::MAX)),
            T::F16 => (10, -14, 65504.0),
        };
        if x == 0.0 {
            return x;
        }
        let wide = f64::from(x);
        let exponent = (wide.abs().log2().floor() as i32).max(smallest);
        let step = 2f64.powi(exponent - mantissa);
        let rounded = (wide / step).round_ties_even() * step;
        if rounded.abs() > largest { f32::INFINITY.copysign(x) } else { rounded as f32 }
    }
}

/// How rows are quantised.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows {
    None,
    /// With the global encode scale.
    Nvfp4(f32),
    Nvfp4Token,
    Mx(Small),
    Fp8Static(f32),
}

fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, v| f32::max(max, v.abs()))
}

fn nvfp4(row: &mut [f32], g: f32) {
    for block in row.chunks_mut(16) {
        let s = Small::E4m3.nearest((g * (amax(block) * (1.0 / 6.0))).clamp(-448.0, 448.0));
        let (up, down) = (if s == 0.0 { 0.0 } else { g / s }, s / g);
        for x in block {
            *x = Small::E2m1.nearest((*x * up).clamp(-6.0, 6.0)) * down;
        }
    }
}

fn mx(row: &mut [f32], element: Small) {
    let (mantissa, largest) = element.shape();
    for block in row.chunks_mut(32) {
        let max = f64::from(amax(block)).max(f64::from(f32::MIN_POSITIVE));
        let exponent = if element == Small::E4m3 {
            // the smallest power of two for which nothing saturates
            (-127..=127).find(|e| 448.0 * 2f64.powi(*e) >= max).unwrap()
        } else {
            // what rounds to the next power of two counts as that
            let floor = max.log2().floor() as i32;
            let next = max / 2f64.powi(floor) >= 2.0 - 2f64.powi(-mantissa - 1);
            (floor + i32::from(next) - largest).clamp(-127, 127)
        };
        let scale = 2f64.powi(exponent);
        for x in block {
            *x = (f64::from(element.nearest((f64::from(*x) / scale) as f32)) * scale) as f32;
        }
    }
}

impl Rows {
    fn quantise(self, row: &mut [f32], t: T) {
        match self {
            Rows::None => {}
            Rows::Nvfp4(g) => nvfp4(row, g),
            Rows::Nvfp4Token => match amax(row) {
                0.0 => {}
                max => nvfp4(row, 448.0 * 6.0 / max),
            },
            Rows::Mx(element) => mx(row, element),
            Rows::Fp8Static(s) => {
                row.iter_mut().for_each(|x| *x = Small::E4m3.nearest(*x / s) * s);
            }
        }
        row.iter_mut().for_each(|x| *x = t.rnd(*x));
    }
}

/// A projection as codes and scales.
#[derive(Clone)]
pub(crate) struct Weights {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) element: Small,
    /// One for each weight, unpacked.
    pub(crate) codes: Vec<u8>,
    /// E4M3 codes of 16 weights with `alpha`, or E8M0 codes of 32.
    pub(crate) scales: Vec<u8>,
    pub(crate) alpha: Option<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) input: Rows,
}

impl Weights {
    fn at(&self, n: usize, k: usize, t: T) -> f32 {
        let value = self.element.value(self.codes[n * self.cols + k]);
        t.rnd(match self.alpha {
            Some(alpha) => {
                let scale = self.scales[n * (self.cols / 16) + k / 16];
                value * (Small::E4m3.value(scale) * alpha)
            }
            None => {
                let scale = self.scales[n * (self.cols / 32) + k / 32];
                (f64::from(value) * 2f64.powi(i32::from(scale) - 127)) as f32
            }
        })
    }

    /// Sums in f32, k ascending, the bias last; not yet rounded.
    fn product(&self, x: &[f32], t: T) -> Vec<f32> {
        let sum = |n: usize| {
            let mut sum = 0.0f32;
            for (k, x) in x.iter().enumerate() {
                sum += x * self.at(n, k, t);
            }
            self.bias.as_ref().map_or(sum, |bias| sum + bias[n])
        };
        (0..self.rows).map(sum).collect()
    }
}

/// The function between the products.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    Silu,
    /// alpha, beta, limit
    Clamped(f32, f32, f32),
    /// of the up projection alone
    Relu2,
}

#[derive(Clone)]
pub(crate) struct Expert {
    pub(crate) gate: Option<Weights>,
    pub(crate) up: Weights,
    pub(crate) down: Weights,
}

impl Expert {
    /// One slot's row, weighted.
    pub(crate) fn row(&self, act: Act, row: &[f32], weight: f32, on_input: bool, t: T) -> Vec<f32> {
        let mut x: Vec<f32> = row.iter().map(|v| t.rnd(*v)).collect();
        if on_input {
            x.iter_mut().for_each(|v| *v = t.rnd(*v * t.rnd(weight)));
        }
        self.up.input.quantise(&mut x, t);
        let u: Vec<f32> = self.up.product(&x, t).into_iter().map(|v| t.rnd(v)).collect();
        let mut h = match &self.gate {
            None => u.iter().map(|u| t.rnd(plain(act, *u))).collect::<Vec<f32>>(),
            Some(gate) => {
                let g = gate.product(&x, t).into_iter().map(|v| t.rnd(v));
                g.zip(u).map(|(g, u)| gated(act, g, u, t)).collect()
            }
        };
        self.down.input.quantise(&mut h, t);
        let y = self.down.product(&h, t);
        y.into_iter().map(|v| t.rnd(if on_input { v } else { v * weight })).collect()
    }
}

fn plain(act: Act, x: f32) -> f32 {
    let x = f64::from(x);
    match act {
        Act::Silu => (x / (1.0 + (-x).exp())) as f32,
        Act::Relu2 => (if x > 0.0 { x * x } else { 0.0 }) as f32,
        Act::Clamped(..) => unreachable!("gated only"),
    }
}

fn gated(act: Act, g: f32, u: f32, t: T) -> f32 {
    match act {
        Act::Silu => t.rnd(t.rnd(plain(act, g)) * u),
        Act::Clamped(alpha, beta, limit) => {
            let (alpha, beta, limit) = (f64::from(alpha), f64::from(beta), f64::from(limit));
            let g = f64::from(g).min(limit);
            let u = f64::from(u).clamp(-limit, limit);
            t.rnd((g / (1.0 + (-alpha * g).exp()) * (u + beta)) as f32)
        }
        Act::Relu2 => unreachable!("not gated"),
    }
}
