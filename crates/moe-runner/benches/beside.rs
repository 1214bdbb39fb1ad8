//! What stands beside the products: how fast experts are made ready, against a copy of the same bytes
//! into fresh memory on the same threads, and the memory that it takes at most; the steps of a pass
//! that run on one thread; the working memory of many layers.
//!
//! `cargo bench -p moe-runner --bench beside -- [THREADS]…` Experts of hidden size 2048 and
//! intermediate size 768, as AWQ and GPTQ store them, and in bf16 as stacks that are transposed.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use moe_kernels::pool::Inline;
use moe_kernels::region::for_each;
use moe_runner::exchange::{Exchange, LocalExchange, LocalRows};
use moe_runner::plan::Plan;
use moe_runner::prelude::*;
use moe_runner::router::{LocalId, LogicalId};
use moe_runner::spec::{
    GateSpec, Granularity, OutputSpec, RoutedScale, ScaleOn, Transform, WeightOn,
};
use moe_runner::weights::{
    Bytes, Codes, Element, FloatType, Floats, Packing, ScaleType, Scales, Stored, ZeroPoints,
    Zeros, random_layer,
};

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 768;
/// Weights of a scale.
const GROUP: usize = 128;

/// Bytes without a pattern (splitmix64).
fn bytes(len: usize, seed: usize) -> Bytes {
    let mut state = seed as u64;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    });
    words.take(len / 8).flat_map(u64::to_le_bytes).collect::<Vec<u8>>().into()
}

fn int4(packing: Packing, shape: [usize; 2], seed: usize) -> Matrix {
    let [rows, cols] = shape;
    let groups = rows * cols / GROUP;
    let scales = [0x66, 0x2E].repeat(groups).into();
    let scales = Scales::new(scales, ScaleType::F16, Granularity::Group, [1, GROUP], shape);
    let scales = scales.expect("whole groups");
    let zeros = match packing {
        Packing::Awq => ZeroPoints::from_i16(&vec![7; groups], scales.shape()).map(Zeros::Each),
        _ => Ok(Zeros::Same(8)),
    };
    let codes = bytes(rows * cols / 2, seed);
    let zeros = zeros.expect("one for each scale");
    let codes = Codes::new((Element::Uint4, packing), codes, shape, scales, zeros, None);
    Matrix::new(codes.expect("whole rows"))
}

fn transposed(shape: [usize; 2], seed: usize) -> Matrix {
    let bytes = bytes(shape[0] * shape[1] * 2, seed);
    Matrix::new(Floats::transposed(bytes, FloatType::Bf16, shape).expect("whole rows"))
}

/// A line of `/proc/self/status`, in bytes; zero where there is none.
fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.unwrap_or_default() * 1024.0
}

fn ready(name: &str, make: impl Fn([usize; 2], usize) -> Matrix, count: usize, threads: usize) {
    let options = Options::new(ActivationDtype::Bf16, threads).expect("threads start");
    let (wide, tall) = ([INTERMEDIATE, HIDDEN], [HIDDEN, INTERMEDIATE]);
    let expert = |e: usize| Expert {
        gate: Some(make(wide, 3 * e)),
        up: make(wide, 3 * e + 1),
        down: make(tall, 3 * e + 2),
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        norm: None,
    };
    let experts: Vec<Expert> = (0..count).map(expert).collect();
    let spec = ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None };
    let matrices: Vec<&Matrix> =
        experts.iter().flat_map(|e| [e.gate.as_ref().unwrap_or(&e.up), &e.up, &e.down]).collect();
    let stored: usize = matrices.iter().map(|matrix| matrix.stored_bytes()).sum();
    let (mut copy, mut time) = (f64::MAX, f64::MAX);
    let (mut packed, mut peak) = (0.0f64, 0.0f64);
    for _ in 0..3 {
        let mut copies: Vec<Vec<u8>> = vec![Vec::new(); matrices.len()];
        let start = Instant::now();
        for_each(&*options.pool, matrices.iter().zip(&mut copies), |(matrix, copy)| {
            match matrix.codes() {
                Some(codes) => copy.extend_from_slice(codes.bytes()),
                None => copy.extend_from_slice(floats_of(matrix)),
            }
        });
        copy = copy.min(start.elapsed().as_secs_f64());
        drop(black_box(copies));

        // the views stay, as the mapped files would
        let views = experts.clone();
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let before = status("VmRSS");
        let start = Instant::now();
        let made = RoutedExperts::new(spec, WeightOn::Output, views, &options);
        time = time.min(start.elapsed().as_secs_f64());
        let made = made.expect("a kernel reads them");
        packed = packed.max(status("VmRSS") - before);
        peak = peak.max(status("VmHWM") - before);
        drop(black_box(made));
    }
    let one = stored as f64 / count as f64;
    println!(
        "{name:16} {threads:3} threads: {:6.2} GB/s, {:.2} of a copy ({:.2} GB/s); at most {:.1} MB \
         for {:.1} MB packed: {:.2} experts a thread more",
        stored as f64 / time / 1e9,
        copy / time,
        stored as f64 / copy / 1e9,
        peak / 1e6,
        packed / 1e6,
        (peak - packed) / one / threads as f64,
    );
}

/// The stored bytes of a matrix of floats.
fn floats_of(matrix: &Matrix) -> &[u8] {
    match matrix.view().stored() {
        Stored::Floats(floats) => floats.bytes(),
        _ => &[],
    }
}

/// The steps of a pass that run on one thread, for top-8 of 128 experts: the shortest of many.
fn serial(tokens: usize) {
    const EXPERTS: usize = 128;
    const TOP_K: usize = 8;
    let slots = tokens * TOP_K;
    let ids: Vec<u32> = (0..slots as u32).map(|i| i.wrapping_mul(0x9E37_79B9) >> 25).collect();
    let local: Vec<LocalId> = ids.iter().copied().map(LocalId).collect();
    let logical: Vec<LogicalId> = ids.iter().copied().map(LogicalId).collect();
    let (mut plan, mut exchange) = (Plan::default(), LocalExchange::new(EXPERTS));
    let (hidden, weights) = (vec![0.0; tokens], vec![1.0; slots]);
    let rows =
        LocalRows { hidden: &hidden, width: 1, top_k: TOP_K, ids: &logical, weights: &weights };
    let best = |work: &mut dyn FnMut()| {
        let once = |_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e6
        };
        (0..200).map(once).fold(f64::MAX, f64::min)
    };
    let built = best(&mut || plan.build(&local, TOP_K, EXPERTS).expect("few slots"));
    let mapped =
        best(&mut || exchange.start_dispatch(0, rows, &Inline).expect("nothing to wait for"));
    println!("{tokens} tokens: the plan {built:.1} µs, ids {mapped:.1} µs");
}

/// The working memory of 48 layers that run one after the other, by what the process holds. (A narrow
/// intermediate size: what a pass keeps are rows of the hidden size.)
fn workspace(threads: usize) {
    const LAYERS: usize = 48;
    const TOKENS: usize = 2048;
    let options = Options::new(ActivationDtype::Bf16, threads).expect("threads start");
    let mut spec = LayerSpec {
        name: "layer".into(),
        index: 0,
        dims: Dims { hidden: HIDDEN, routed_hidden: HIDDEN, intermediate: 64 },
        gate: GateSpec::default(),
        router: RouterSpec::softmax(8, 8, true),
        expert: ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None },
        input_transform: Transform::default(),
        output_transform: Transform::default(),
        routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
        shared: None,
        output: OutputSpec::default(),
    };
    let mut runners: Vec<MoeRunner> = (0..LAYERS)
        .map(|index| {
            spec.index = index;
            let layer = random_layer(&spec, FloatType::Bf16, 1).expect("a layer of any size");
            MoeRunner::new(layer.ready(&options).expect("a kernel for bf16"))
        })
        .collect();
    let hidden = vec![bf16::from_f32(0.5); TOKENS * HIDDEN];
    let mut out = hidden.clone();
    let before = status("VmRSS");
    let mut first = 0.0;
    for (i, runner) in runners.iter_mut().enumerate() {
        let input = ForwardInput::new(Rows::Bf16(&hidden));
        runner.forward(&input, RowsMut::Bf16(&mut out)).expect("finite rows");
        if i == 0 {
            first = status("VmRSS") - before;
        }
    }
    println!(
        "{LAYERS} layers, {TOKENS} tokens: {:.1} MB after the first, {:.1} MB after all; a layer \
         states {:.1} MB",
        first / 1e6,
        (status("VmRSS") - before) / 1e6,
        runners[0].workspace_bytes(TOKENS) as f64 / 1e6,
    );
}

fn main() {
    for tokens in [512, 2048] {
        serial(tokens);
    }
    let args = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let mut threads: Vec<usize> = args.collect();
    if threads.is_empty() {
        threads = vec![1, moe_kernels::isa::physical_cores()];
    }
    for threads in threads {
        workspace(threads);
        ready("awq", |shape, seed| int4(Packing::Awq, shape, seed), 128, threads);
        ready("gptq", |shape, seed| int4(Packing::Gptq, shape, seed), 128, threads);
        ready("bf16 transposed", transposed, 64, threads);
    }
}
