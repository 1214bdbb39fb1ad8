//! Products with packed weights: bytes and operations a second for each format; how fast they are
//! packed, beside a copy; the functions between products; an empty region.
//!
//! `cargo bench -p moe-kernels --bench gemm -- [set of features]… [format]…` Experts of a layer with hidden size 2048
//! and intermediate size 768, eight at a time out of more than 256 MiB, in an order without pattern.

use std::time::{Duration, Instant};

use moe_kernels::activation::Activation;
use moe_kernels::gemm::{Gemm, gemm};
use moe_kernels::isa::{Cpu, Features, physical_cores};
use moe_kernels::kernel::Kernel;
use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::quantise::Qdq;
use moe_kernels::operand::OperandKind;
use moe_kernels::pack::{Packed, pack};
use moe_kernels::pool::Pool;
use moe_kernels::rows::{Rows, RowsMut};
use moe_kernels::stored::{
    Blocks, Codes, Element, FloatType, Floats, Granularity, Packing, ScaleType, Scales, View,
    ZeroPoints, Zeros,
};

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 768;
const LEAST: usize = 256 << 20;
/// Experts of a token.
const ACTIVE: usize = 8;

/// A format: makes a matrix `[rows, cols]`.
type Make = fn([usize; 2]) -> View;

const FORMATS: &[(&str, Make)] = &[
    ("bf16", |shape| floats(FloatType::Bf16, shape, false)),
    ("f16", |shape| floats(FloatType::F16, shape, false)),
    ("f32", |shape| floats(FloatType::F32, shape, false)),
    ("int4 g128", |shape| codes(Element::Uint4, Packing::Rows, (ScaleType::F16, 128), true, shape)),
    ("int4 g32", |shape| codes(Element::Uint4, Packing::Rows, (ScaleType::F16, 32), true, shape)),
    ("awq g128", |shape| codes(Element::Uint4, Packing::Awq, (ScaleType::F16, 128), false, shape)),
    ("gptq g128", |shape| codes(Element::Uint4, Packing::Gptq, (ScaleType::F16, 128), true, shape)),
    ("mxfp4", |shape| codes(Element::E2m1, Packing::Rows, (ScaleType::E8m0, 32), true, shape)),
    ("nvfp4", |shape| codes(Element::E2m1, Packing::Rows, (ScaleType::E4m3, 16), true, shape)),
    ("fp8 block", |shape| {
        let scales = vec![0x3F; shape[0].div_ceil(128) * shape[1].div_ceil(128) * 2];
        let block = (Granularity::Block, [128, 128]);
        let scales = Scales::new(scales.into(), ScaleType::Bf16, block.0, block.1, shape).unwrap();
        with_scales(Element::E4m3, Packing::Rows, scales, Zeros::None, shape)
    }),
    ("fp8 e5m2", |shape| codes(Element::E5m2, Packing::Rows, (ScaleType::F32, 0), true, shape)),
    ("int8", |shape| codes(Element::Int8, Packing::Rows, (ScaleType::F32, 0), true, shape)),
    ("mxfp8", |shape| codes(Element::E4m3, Packing::Rows, (ScaleType::E8m0, 32), true, shape)),
    ("mxfp6", |shape| codes(Element::E2m3, Packing::Rows, (ScaleType::E8m0, 32), true, shape)),
    ("q4_0", |shape| blocks(BlockType::Q4_0, shape)),
    ("q5_0", |shape| blocks(BlockType::Q5_0, shape)),
    ("q8_0", |shape| blocks(BlockType::Q8_0, shape)),
    ("q2_k", |shape| blocks(BlockType::Q2K, shape)),
    ("q3_k", |shape| blocks(BlockType::Q3K, shape)),
    ("q4_k", |shape| blocks(BlockType::Q4K, shape)),
    ("q5_k", |shape| blocks(BlockType::Q5K, shape)),
    ("q6_k", |shape| blocks(BlockType::Q6K, shape)),
    ("iq4_xs", |shape| blocks(BlockType::Iq4Xs, shape)),
    ("tq2_0", |shape| blocks(BlockType::Tq2_0, shape)),
    ("bf16 transposed", |shape| floats(FloatType::Bf16, shape, true)),
];

/// Sets of features, with the rows that are multiplied with them.
const SETS: [(&str, OperandKind, Features); 7] = [
    ("amx_bf16", OperandKind::TileBf16, Features::V4_AMX),
    ("avx512_bf16", OperandKind::Bf16, Features::V4_BF16),
    ("avx512_vnni", OperandKind::Int8, Features::V4_VNNI.with(Features::AVX512_VBMI)),
    ("avx512", OperandKind::F32, Features::V4),
    ("avx2_int8", OperandKind::Int8, Features::V3),
    ("avx2", OperandKind::F32, Features::V3),
    ("portable", OperandKind::F32, Features::NONE),
];

/// How rows of integers were quantised: they are whole numbers.
const ROWS: Qdq = Qdq::Int8Static { scale: 1.0 };

/// Bytes without a pattern (splitmix64).
fn bytes(len: usize) -> Vec<u8> {
    let mut state = len as u64;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    });
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

fn floats(float: FloatType, shape: [usize; 2], transposed: bool) -> View {
    let mut bytes = bytes(shape[0] * shape[1] * float.size());
    // Near one: no infinities, no subnormal numbers.
    bytes.chunks_exact_mut(float.size()).for_each(|v| v[float.size() - 1] = 0x3B | v[0] & 0x80);
    let make = if transposed { Floats::transposed } else { Floats::row_major };
    View::new(make(bytes.into(), float, shape).unwrap())
}

/// `group` 0: a scale for each row.
fn codes(
    element: Element,
    packing: Packing,
    (stored, group): (ScaleType, usize),
    symmetric: bool,
    shape: [usize; 2],
) -> View {
    let across = shape[1].checked_div(group).unwrap_or(1);
    let one: &[u8] = match stored {
        ScaleType::F32 => &[0, 0, 0, 0x3F],
        ScaleType::F16 => &[0x66, 0x2E],
        ScaleType::Bf16 => &[0x20, 0x3F],
        ScaleType::E4m3 => &[0x31],
        ScaleType::E8m0 => &[0x7C],
    };
    let granularity = if group == 0 { Granularity::Channel } else { Granularity::Group };
    let scales = one.repeat(shape[0] * across);
    let scales = Scales::new(scales.into(), stored, granularity, [1, group], shape).unwrap();
    let zeros = match symmetric {
        true if element == Element::Uint4 => Zeros::Same(8),
        true => Zeros::None,
        false => {
            Zeros::Each(ZeroPoints::from_i16(&vec![7; shape[0] * across], scales.shape()).unwrap())
        }
    };
    with_scales(element, packing, scales, zeros, shape)
}

fn with_scales(
    element: Element,
    packing: Packing,
    scales: Scales,
    zeros: Zeros,
    shape: [usize; 2],
) -> View {
    let len = match packing {
        Packing::Rows => shape[0] * element.row_bytes(shape[1]).unwrap(),
        _ => shape[0] * shape[1] * element.bits() / 8,
    };
    let mut bytes = bytes(len);
    if matches!(element, Element::E4m3 | Element::E5m2) {
        bytes.iter_mut().for_each(|code| *code &= 0xBF);
    }
    let made = Codes::new((element, packing), bytes.into(), shape, scales, zeros, None);
    View::new(made.unwrap())
}

fn blocks(block: BlockType, shape: [usize; 2]) -> View {
    let mut bytes = bytes(shape[0] * block.row_bytes(shape[1]).unwrap());
    let fields: &[usize] = match block {
        BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q2K => &[80, 82],
        BlockType::Q3K => &[108],
        BlockType::Q6K => &[208],
        BlockType::Tq2_0 => &[64],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(block.block_bytes()) {
        fields.iter().for_each(|at| block[*at..*at + 2].copy_from_slice(&[0x66, 0x2E]));
    }
    View::new(Blocks::new(block, bytes.into(), shape).unwrap())
}

/// The shortest time of `work` within `budget`, of two runs at least.
fn best(budget: Duration, mut work: impl FnMut()) -> f64 {
    let (end, mut best) = (Instant::now() + budget, f64::MAX);
    for run in 0.. {
        if run >= 2 && Instant::now() > end {
            break;
        }
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// The projections of an expert: gate and up `[768, 2048]`, down `[2048, 768]`.
struct Experts<W> {
    of: Vec<[W; 3]>,
    bytes: usize,
}

/// Experts in an order without pattern, some at a time, as many as there are.
fn layers(experts: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..experts).collect();
    for i in (1..experts).rev() {
        order.swap(i, i.wrapping_mul(0x9E37_79B9).rotate_left(13) % (i + 1));
    }
    order.chunks_exact(ACTIVE.min(experts)).map(<[usize]>::to_vec).collect()
}

/// One pass over all experts: for each layer gate and up, then down. `work(expert, projection, part)`
/// does a part of a product.
fn pass(
    pool: &Pool,
    layers: &[Vec<usize>],
    parts: usize,
    work: &(dyn Fn(usize, usize, usize) + Sync),
) {
    for experts in layers {
        let count = experts.len();
        pool.run(2 * count * parts, &|_, i| work(experts[i / parts / 2], i / parts % 2, i % parts));
        pool.run(count * parts, &|_, i| work(experts[i / parts], 2, i % parts));
    }
}

/// Rows of an expert, and their outputs.
struct Tokens {
    rows: usize,
    x: [Vec<f32>; 2],
}

impl Tokens {
    fn new(rows: usize) -> Tokens {
        let x =
            [HIDDEN, INTERMEDIATE].map(|k| (0..rows * k).map(|i| (i % 17) as f32 - 8.0).collect());
        Tokens { rows, x }
    }
}

const PARTS: usize = 3;

/// Seconds of a pass with packed weights.
fn packed(pool: &Pool, experts: &Experts<Packed>, tokens: &Tokens, layers: &[Vec<usize>]) -> f64 {
    let gemm: &Gemm = experts.of[0][0].gemm();
    let mut memory = [0, 1].map(|i| {
        let w = &experts.of[0][2 * i];
        vec![0u8; gemm.operand_bytes(w, tokens.rows) + 64]
    });
    let mut operands = memory.iter_mut().enumerate().map(|(i, memory)| {
        let start = memory.as_ptr().align_offset(64);
        let w = &experts.of[0][2 * i];
        let x = Rows::new(&tokens.x[i], tokens.rows, w.cols(), w.cols());
        gemm.operand(w, x, &mut memory[start..])
    });
    let operands = [operands.next().unwrap(), operands.next().unwrap()];
    best(Duration::from_millis(300), || {
        pass(pool, layers, PARTS, &|expert, projection, part| {
            let w = &experts.of[expert][projection];
            let units = w.units() * part / PARTS..w.units() * (part + 1) / PARTS;
            let columns = w.columns(units.clone()).len();
            with_output(tokens.rows * columns, |out| {
                let mut out = RowsMut::new(out, tokens.rows, columns, columns);
                gemm.run(w, operands[projection / 2], 0..tokens.rows, units, &mut out);
            });
        });
    })
}

/// Lends memory of the thread.
fn with_output(len: usize, work: impl FnOnce(&mut [f32])) {
    thread_local!(static OUT: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) });
    OUT.with_borrow_mut(|out| {
        out.resize(len.max(out.len()), 0.0);
        work(&mut out[..len]);
    });
}

fn report(name: &str, bytes: usize, experts: usize, time: impl Fn(&Tokens) -> f64) {
    print!("  {name:16}");
    for rows in [1, 4, 16, 128] {
        let time = time(&Tokens::new(rows));
        let operations = 2.0 * (rows * experts * 3 * HIDDEN * INTERMEDIATE) as f64;
        print!(" | {:6.1} GB/s {:6.1} GFLOP/s", bytes as f64 / time / 1e9, operations / time / 1e9);
        if rows == 1 {
            print!(" {:5.1} Gweight/s", operations / 2.0 / time / 1e9);
        }
    }
    println!();
}

/// The functions between the products, and a copy into memory that nobody has touched, which is what
/// packing is compared with.
fn beside() {
    let kernel = Kernel::detect();
    let (values, mut gate) = (vec![0.7; 1 << 14], vec![0.5; 1 << 14]);
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        let time = best(Duration::from_millis(50), || {
            kernel.activate(activation, &mut gate, Some(&values));
        });
        println!("{activation:?}: {:.2} ns an element", time * 1e9 / gate.len() as f64);
    }
    let from = vec![1u8; LEAST];
    let time = best(Duration::ZERO, || drop(std::hint::black_box(from.clone())));
    println!("a copy on one thread: {:.2} GB/s", LEAST as f64 / time / 1e9);
}

fn main() {
    beside();
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let cores = physical_cores();
    let shapes = [[INTERMEDIATE, HIDDEN], [INTERMEDIATE, HIDDEN], [HIDDEN, INTERMEDIATE]];
    for threads in [1, cores] {
        let pool = Pool::new(threads).expect("the operating system starts threads");
        let empty = best(Duration::from_millis(200), || pool.run(2 * threads, &|_, _| ()));
        println!(
            "{threads} threads: an empty region of {} items {:.2} µs",
            2 * threads,
            empty * 1e6
        );
        println!("{threads} threads; rows an expert: 1, 4, 16, 128");
        for (set, rows, have) in SETS {
            let among = |names: &[&str]| wanted.iter().any(|w| names.contains(&w.as_str()));
            let asked = |names: &[&str], name: &str| !among(names) || among(&[name]);
            if !(Cpu::detect().has(have) && asked(&SETS.map(|(set, ..)| set), set)) {
                continue;
            }
            println!(" {set}");
            let names: Vec<&str> = FORMATS.iter().map(|(name, _)| *name).collect();
            for (name, make) in FORMATS.iter().filter(|(name, _)| asked(&names, name)) {
                let views = shapes.map(make);
                let Some(entry) = gemm(&views[0], rows, have) else { continue };
                let stored: usize = views.iter().map(View::stored_bytes).sum();
                let count = LEAST.div_ceil(stored).next_multiple_of(ACTIVE);
                let start = Instant::now();
                let of: Vec<[Packed; 3]> = (0..count)
                    .map(|_| {
                        [0, 1, 2].map(|i| {
                            let packed = pack(&views[i], entry).unwrap();
                            if rows == OperandKind::Int8 { packed.coded(ROWS) } else { packed }
                        })
                    })
                    .collect();
                let packing = stored as f64 * count as f64 / start.elapsed().as_secs_f64() / 1e9;
                let bytes = of.iter().flatten().map(Packed::bytes).sum();
                let experts = Experts { of, bytes };
                let layers = layers(count);
                let tokens = |tokens: &Tokens| packed(&pool, &experts, tokens, &layers);
                report(name, experts.bytes, count, tokens);
                print!("{:19}packs {packing:.2} GB/s", "");
                println!(
                    ", {:.3} bytes a stored byte",
                    experts.bytes as f64 / (stored * count) as f64
                );
            }
        }
    }
}
