//! The emulation kernels, bit by bit, against a scalar model that shares no code with them; then
//! against recorded outputs, and through every way of splitting.

#[path = "../layers/mod.rs"]
mod layers;

mod model;
mod recorded;

use model::{Act, Rows, Small, T, Weights};
use moe_kernels::arena::Arena;
use moe_kernels::numerics::quantise::{Fp6, Mxfp8Rule, Nvfp4Rule, Qdq};
use moe_kernels::numerics::{DecodeScale, EncodeScale};
use moe_kernels::pool::Pool;
use moe_runner::experts::{BuiltKernel, ExpertCall, ExpertSet, KERNELS, KernelDesc, build};
use moe_runner::hidden::ActivationDtype;
use moe_runner::plan::{NO_EXPERT, NO_PLACE, Plan};
use moe_runner::random::Random;
use moe_runner::router::LocalId;
use moe_runner::spec::{Activation, ExpertSpec, Granularity, WeightOn};
use moe_runner::weights::{
    ActivationQuant, Codes, Element, Expert, Global, Matrix, Packing, ScaleType, Scales, Zeros,
};

fn kernel(name: &str) -> &'static KernelDesc {
    KERNELS.iter().find(|kernel| kernel.name == name).expect("a kernel of that name")
}

fn dtype(t: T) -> ActivationDtype {
    match t {
        T::F32 => ActivationDtype::F32,
        T::Bf16 => ActivationDtype::Bf16,
        T::F16 => ActivationDtype::F16,
    }
}

/// The runner's name for the model's quantisation. The rule of arithmetic is the emulation's own,
/// whatever the checkpoint's is.
fn input(rows: Rows) -> ActivationQuant {
    let rule = Nvfp4Rule::Division;
    ActivationQuant::Quantised(match rows {
        Rows::None => return ActivationQuant::None,
        Rows::Nvfp4(global) => Qdq::Nvfp4 { global: EncodeScale(global), rule },
        Rows::Nvfp4Token => Qdq::Nvfp4Token { rule },
        Rows::Mx(Small::E2m1) => Qdq::Mxfp4,
        Rows::Mx(Small::E2m3) => Qdq::Mxfp6(Fp6::E2M3),
        Rows::Mx(Small::E3m2) => Qdq::Mxfp6(Fp6::E3M2),
        Rows::Mx(Small::E4m3) => Qdq::Mxfp8(Mxfp8Rule::Ceil),
        Rows::Fp8Static(scale) => Qdq::Fp8Static { scale },
    })
}

/// Codes packed along each row, the first in the lowest bits.
fn pack(codes: &[u8], cols: usize, bits: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for row in codes.chunks(cols) {
        let mut bytes = vec![0u8; (cols * bits).div_ceil(8)];
        for (k, code) in row.iter().enumerate() {
            for bit in 0..bits {
                let at = k * bits + bit;
                bytes[at / 8] |= (code >> bit & 1) << (at % 8);
            }
        }
        out.extend(bytes);
    }
    out
}

/// The same weights for the runner.
fn matrix(weights: &Weights) -> Matrix {
    let (element, bits) = match weights.element {
        Small::E2m1 => (Element::E2m1, 4),
        Small::E2m3 => (Element::E2m3, 6),
        Small::E3m2 => (Element::E3m2, 6),
        Small::E4m3 => (Element::E4m3, 8),
    };
    let (stored, group) = match weights.alpha {
        Some(_) => (ScaleType::E4m3, 16),
        None => (ScaleType::E8m0, 32),
    };
    let shape = [weights.rows, weights.cols];
    let scales = weights.scales.clone().into();
    let scales = Scales::new(scales, stored, Granularity::Group, [1, group], shape).unwrap();
    let global = weights.alpha.map(|alpha| Global::Multiply(DecodeScale(alpha)));
    let codes = pack(&weights.codes, weights.cols, bits).into();
    let packing = (element, Packing::Rows);
    let codes = Codes::new(packing, codes, shape, scales, Zeros::None, global).unwrap();
    Matrix::new(codes).with_input(input(weights.input))
}

/// What is tested: a kernel, what it reads, and what the layer does.
#[derive(Clone, Copy, Debug)]
struct Case {
    kernel: &'static str,
    element: Small,
    rows: Rows,
    act: Act,
    bias: bool,
    on_input: bool,
    experts: usize,
    hidden: usize,
    intermediate: usize,
}

const NVFP4: Case = Case {
    kernel: "emulation_nvfp4",
    element: Small::E2m1,
    rows: Rows::Nvfp4(300.0),
    act: Act::Silu,
    bias: false,
    on_input: false,
    experts: 4,
    hidden: 80,
    intermediate: 48,
};

const OCP_MX: Case = Case {
    kernel: "emulation_ocp_mx",
    rows: Rows::Mx(Small::E2m1),
    hidden: 96,
    intermediate: 64,
    ..NVFP4
};

fn weights(random: &mut Random, case: Case, rows: usize, cols: usize) -> Weights {
    let mut below = |n: u64| (random.bits() % n) as u8;
    let nvfp4 = case.kernel == "emulation_nvfp4";
    let codes = (0..rows * cols).map(|_| match case.element {
        Small::E2m1 => below(16),
        Small::E2m3 | Small::E3m2 => below(64),
        // magnitudes up to 15, no NaN
        Small::E4m3 => below(0x58) | below(2) << 7,
    });
    let codes: Vec<u8> = codes.collect();
    let group = if nvfp4 { 16 } else { 32 };
    // scales about one, some of them zero or tiny
    let scales = (0..rows * cols / group).map(|_| match (nvfp4, below(20)) {
        (true, 0) => 0,
        (true, _) => 0x20 + below(0x20),
        (false, 0) => 90,
        (false, _) => 121 + below(4),
    });
    let scales: Vec<u8> = scales.collect();
    Weights {
        rows,
        cols,
        element: case.element,
        codes,
        scales,
        alpha: nvfp4.then(|| 0.1 + random.symmetric(0.05)),
        bias: case.bias.then(|| random.values(rows, 0.5)),
        input: case.rows,
    }
}

/// The experts of a case, for the model.
fn experts(case: Case) -> Vec<model::Expert> {
    let random = &mut Random::new(11);
    let (hidden, intermediate) = (case.hidden, case.intermediate);
    let one = |_| model::Expert {
        gate: (!matches!(case.act, Act::Relu2))
            .then(|| weights(random, case, intermediate, hidden)),
        up: weights(random, case, intermediate, hidden),
        down: weights(random, case, hidden, intermediate),
    };
    (0..case.experts).map(one).collect()
}

/// Rows [T, H] and routing [T, k].
struct Batch {
    rows: Vec<f32>,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
    k: usize,
}

/// Seven rows of three slots: an expert twice, slots without an expert, a row of zeros, blocks of
/// zeros, a block too small for any scale.
fn batch(case: Case, t: T) -> Batch {
    let (random, k, tokens) = (&mut Random::new(5), 3, 7);
    let mut rows = random.values(tokens * case.hidden, 2.0);
    rows[case.hidden..2 * case.hidden].fill(0.0);
    rows[2 * case.hidden + 32..2 * case.hidden + 64].fill(0.0);
    rows[3 * case.hidden..3 * case.hidden + 32].iter_mut().for_each(|v| *v *= 1e-7);
    rows.iter_mut().for_each(|v| *v = t.rnd(*v));
    let last = case.experts as u32 - 1;
    let mut ids: Vec<LocalId> =
        (0..tokens * k).map(|_| LocalId((random.bits() % u64::from(last + 1)) as u32)).collect();
    (ids[0], ids[1], ids[2]) = (LocalId(last), LocalId(last), LocalId(0));
    ids[4] = NO_EXPERT;
    let weights = (0..tokens * k).map(|_| 0.5 + random.symmetric(0.5)).collect();
    Batch { rows, ids, weights, k }
}

/// The kernel's rows by slot; NaN for slots without an expert.
fn run(case: Case, t: T, experts: &[model::Expert], batch: &Batch, threads: usize) -> Vec<f32> {
    let experts: Vec<Expert> = experts
        .iter()
        .map(|expert| Expert {
            gate: expert.gate.as_ref().map(matrix),
            up: matrix(&expert.up),
            down: matrix(&expert.down),
            gate_bias: expert.gate.as_ref().and_then(|gate| gate.bias.clone()),
            up_bias: expert.up.bias.clone(),
            down_bias: expert.down.bias.clone(),
            norm: None,
        })
        .collect();
    let activation = match case.act {
        Act::Silu => Activation::Silu,
        Act::Clamped(alpha, beta, limit) => Activation::ClampedSwiglu { alpha, beta, limit },
        Act::Relu2 => Activation::Relu2,
    };
    let gated = !matches!(case.act, Act::Relu2);
    let spec = ExpertSpec { gated, activation, bias: case.bias, norm: None };
    let weight_on = if case.on_input { WeightOn::Input } else { WeightOn::Output };
    let set = ExpertSet { spec: &spec, weight_on, experts: &experts };
    let built = build(kernel(case.kernel), set, dtype(t)).unwrap();
    let BuiltKernel::Modular(kernel) = built else { panic!("it does not route") };
    let mut plan = Plan::default();
    plan.build(&batch.ids, batch.k, experts.len()).unwrap();
    let mut out = vec![f32::NAN; plan.slots_planned() * case.hidden];
    kernel
        .forward(ExpertCall {
            rows: &batch.rows,
            plan: &plan,
            weights: &batch.weights,
            out: &mut out,
            quantised: false,
            row_max: None,
            pool: &Pool::new(threads).unwrap(),
            arena: &mut Arena::default(),
        })
        .unwrap();
    let row = |place: &u32| match *place {
        NO_PLACE => vec![f32::NAN; case.hidden],
        place => out[place as usize * case.hidden..][..case.hidden].to_vec(),
    };
    plan.places().iter().flat_map(row).collect()
}

fn expect_bits(case: Case, t: T) {
    let (experts, batch) = (experts(case), batch(case, t));
    let got = run(case, t, &experts, &batch, 2);
    let mut nonzero = 0;
    for (slot, got) in got.chunks(case.hidden).enumerate() {
        let id = batch.ids[slot];
        if id == NO_EXPERT {
            assert!(got.iter().all(|v| v.is_nan()), "{case:?} {t:?}: slot {slot} is written");
            continue;
        }
        let row = &batch.rows[slot / batch.k * case.hidden..][..case.hidden];
        let weight = batch.weights[slot];
        let want = experts[id.0 as usize].row(case.act, row, weight, case.on_input, t);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // the sign of a zero says nothing
            assert_eq!(
                (got + 0.0).to_bits(),
                (want + 0.0).to_bits(),
                "{case:?} {t:?}: slot {slot}, column {i}: {got}, {want} expected"
            );
            assert!(want.is_finite());
            nonzero += usize::from(*want != 0.0);
        }
    }
    assert!(nonzero > 10 * case.hidden, "{case:?}: almost nothing but zeros is no test");
}

const DTYPES: [T; 3] = [T::F32, T::Bf16, T::F16];
const CLAMPED: Act = Act::Clamped(1.702, 1.0, 0.9);

#[test]
fn nvfp4_equals_the_model_bit_by_bit() {
    for t in DTYPES {
        for act in [Act::Silu, CLAMPED, Act::Relu2] {
            expect_bits(Case { act, ..NVFP4 }, t);
        }
        expect_bits(Case { rows: Rows::Nvfp4Token, ..NVFP4 }, t);
        expect_bits(Case { on_input: true, ..NVFP4 }, t);
        expect_bits(Case { experts: 1, ..NVFP4 }, t);
    }
}

#[test]
fn ocp_mx_equals_the_model_bit_by_bit() {
    for t in DTYPES {
        for element in [Small::E2m1, Small::E2m3, Small::E3m2, Small::E4m3] {
            for rows in [
                Rows::None,
                Rows::Mx(Small::E2m1),
                Rows::Mx(Small::E2m3),
                Rows::Mx(Small::E3m2),
                Rows::Mx(Small::E4m3),
                Rows::Fp8Static(0.01),
            ] {
                expect_bits(Case { element, rows, ..OCP_MX }, t);
            }
        }
        expect_bits(Case { act: CLAMPED, bias: true, ..OCP_MX }, t);
        expect_bits(Case { on_input: true, ..OCP_MX }, t);
        let mxfp8 = Case { element: Small::E4m3, rows: Rows::Mx(Small::E4m3), ..OCP_MX };
        expect_bits(Case { kernel: "emulation_mxfp8", bias: true, ..mxfp8 }, t);
    }
}

#[test]
fn neither_threads_nor_other_rows_change_a_bit() {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for case in [NVFP4, Case { rows: Rows::Nvfp4Token, ..NVFP4 }, OCP_MX] {
        let t = T::Bf16;
        let (experts, batch) = (experts(case), batch(case, t));
        let all = run(case, t, &experts, &batch, 1);
        assert_eq!(bits(&all), bits(&run(case, t, &experts, &batch, 3)), "{case:?}: threads");
        for row in 0..batch.rows.len() / case.hidden {
            let slots = row * batch.k..(row + 1) * batch.k;
            let one = Batch {
                rows: batch.rows[row * case.hidden..][..case.hidden].to_vec(),
                ids: batch.ids[slots.clone()].to_vec(),
                weights: batch.weights[slots.clone()].to_vec(),
                k: batch.k,
            };
            let alone = run(case, t, &experts, &one, 2);
            let among = &all[slots.start * case.hidden..slots.end * case.hidden];
            assert_eq!(bits(&alone), bits(among), "{case:?}: row {row} alone");
        }
    }
    let none = Batch { rows: Vec::new(), ids: Vec::new(), weights: Vec::new(), k: 3 };
    assert!(run(NVFP4, T::Bf16, &experts(NVFP4), &none, 2).is_empty());
}

#[test]
fn rows_quantised_in_two_ways_at_once_are_refused() {
    let mut experts = experts(NVFP4);
    experts[2].up.input = Rows::Nvfp4(200.0);
    let stored: Vec<Expert> = experts
        .iter()
        .map(|expert| Expert {
            gate: expert.gate.as_ref().map(matrix),
            up: matrix(&expert.up),
            down: matrix(&expert.down),
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            norm: None,
        })
        .collect();
    let spec = ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None };
    let set = ExpertSet { spec: &spec, weight_on: WeightOn::Output, experts: &stored };
    let error = build(kernel("emulation_nvfp4"), set, ActivationDtype::Bf16);
    assert!(error.unwrap_err().to_string().contains("expert 2"));
}
