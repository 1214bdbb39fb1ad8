//! Every kernel against a float64 sum, and against itself in other tiles.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::pool::Pool;
use crate::region::for_each;

/// Kernels of every instruction set of this CPU.
fn kernels() -> Vec<Kernel> {
    Isa::available().into_iter().map(|isa| Kernel::new(isa).unwrap()).collect()
}

/// Numbers in (-1, 1), of a generator of its own so that a case is its seed (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn take(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// Weights as stored, from an odd address, and what they are worth.
struct Weights {
    bytes: Vec<u8>,
    values: Vec<f32>,
    float: Float,
}

impl Weights {
    fn new(values: &[f32], float: Float) -> Weights {
        // The first element lies at an odd address whatever the allocator returns.
        let mut bytes = Vec::with_capacity(values.len() * 4 + 2);
        bytes.resize(1 + bytes.as_ptr() as usize % 2, 0);
        bytes.drain(..bytes.len() - 1);
        let mut rounded = Vec::new();
        for &value in values {
            match float {
                Float::F32 => {
                    bytes.extend(value.to_le_bytes());
                    rounded.push(value);
                }
                Float::F16 => {
                    bytes.extend(f16::from_f32(value).to_le_bytes());
                    rounded.push(f16::from_f32(value).to_f32());
                }
                Float::Bf16 => {
                    bytes.extend(bf16::from_f32(value).to_le_bytes());
                    rounded.push(bf16::from_f32(value).to_f32());
                }
            }
        }
        Weights { bytes, values: rounded, float }
    }

    fn rows(&self, rows: usize, cols: usize, stride: usize) -> WeightRows<'_> {
        WeightRows::new(&self.bytes[1..], self.float, rows, cols, stride)
    }
}

/// Shapes with ones, tails of every kind, and several blocks, strips and tiles.
fn shapes() -> impl Strategy<Value = (usize, usize, usize)> {
    let m = prop_oneof![1..=8usize, 1..40usize];
    let n = prop_oneof![1..=9usize, 1..40usize];
    let k = prop_oneof![Just(0usize), 1..=33usize, 1..300usize, Just(2048), Just(4100)];
    (m, n, k)
}

fn floats() -> impl Strategy<Value = Float> {
    prop_oneof![Just(Float::F32), Just(Float::F16), Just(Float::Bf16)]
}

proptest! {
    /// Within the rounding errors of K additions and multiplications in f32 of a float64 sum.
    /// What lies between and after the rows is neither read into a result nor written.
    #[test]
    fn close_to_float64(
        (m, n, k) in shapes(),
        float in floats(),
        seed: u64,
        (pad_x, pad_w, pad_out) in (0..3usize, 0..3usize, 0..3usize),
    ) {
        let mut numbers = Numbers(seed);
        let (x_stride, w_stride, out_stride) = (k + pad_x, k + pad_w, n + pad_out);
        let mut x = numbers.take(m * x_stride);
        let mut values = numbers.take(n * w_stride);
        for (data, stride) in [(&mut x, x_stride), (&mut values, w_stride)] {
            for row in data.chunks_mut(stride.max(1)) {
                let cols = k.min(row.len());
                row[cols..].fill(f32::NAN);
            }
        }
        let w = Weights::new(&values, float);
        for kernel in kernels() {
            let mut out = vec![-7.0; m * out_stride];
            let rows = &mut RowsMut::new(&mut out, m, n, out_stride);
            kernel.dot(Rows::new(&x, m, k, x_stride), w.rows(n, k, w_stride), rows);
            for i in 0..m {
                for j in 0..n {
                    let (mut sum, mut size) = (0.0, 0.0);
                    for c in 0..k {
                        let product = f64::from(x[i * x_stride + c]) * f64::from(w.values[j * w_stride + c]);
                        sum += product;
                        size += product.abs();
                    }
                    let bound = 2.0 * k as f64 * 2f64.powi(-24) * size;
                    let got = f64::from(out[i * out_stride + j]);
                    prop_assert!((got - sum).abs() <= bound, "{}: [{i}][{j}] {got} is not {sum}", kernel.isa());
                }
                prop_assert!(out[i * out_stride + n..(i + 1) * out_stride].iter().all(|v| *v == -7.0));
            }
        }
    }

    /// A row of the result is the same bit by bit alone, in any batch, for any cut of the weights.
    #[test]
    fn the_same_bits_in_any_tile(
        (m, n, k) in shapes(),
        float in floats(),
        seed: u64,
        first in 0..8usize,
        tile_cols in 1..12usize,
    ) {
        let mut numbers = Numbers(seed);
        let x = numbers.take(m * k);
        let w = Weights::new(&numbers.take(n * k), float);
        let (x, w) = (Rows::new(&x, m, k, k), w.rows(n, k, k));
        let pool = Pool::new(3).unwrap();
        let bits = |out: &[f32]| out.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        for kernel in kernels() {
            let mut whole = vec![0.0; m * n];
            kernel.dot(x, w, &mut RowsMut::new(&mut whole, m, n, n));
            // One token and one weight row at a time.
            let mut single = vec![0.0; m * n];
            for i in 0..m {
                for j in 0..n {
                    let out = &mut RowsMut::new(&mut single[i * n + j..], 1, 1, 1);
                    kernel.dot(x.slice(i..i + 1), w.slice(j..j + 1), out);
                }
            }
            prop_assert_eq!(bits(&whole), bits(&single), "{}", kernel.isa());
            // In parallel, in two blocks of tokens and tiles of any width.
            let first = first.min(m);
            let blocks = [0..first, first..m];
            let mut tiled = vec![0.0; m * n];
            let mut rows = RowsMut::new(&mut tiled, m, n, n);
            for_each(&pool, rows.tiles(&blocks, tile_cols), |Tile { block, cols, mut out, .. }| {
                kernel.dot(x.slice(blocks[block].clone()), w.slice(cols), &mut out);
            });
            prop_assert_eq!(bits(&whole), bits(&tiled), "{}", kernel.isa());
            // In blocks of equal size.
            let mut tiled = vec![0.0; m * n];
            let mut rows = RowsMut::new(&mut tiled, m, n, n);
            for_each(&pool, rows.even_tiles(first.max(1), tile_cols), |mut tile| {
                kernel.dot(x.slice(tile.rows), w.slice(tile.cols), &mut tile.out);
            });
            prop_assert_eq!(bits(&whole), bits(&tiled), "{}", kernel.isa());
        }
    }
}

/// Infinities and NaN come out where they belong, and only there.
#[test]
fn special_values() {
    for kernel in kernels() {
        for float in [Float::F32, Float::F16, Float::Bf16] {
            let k = 37;
            for at in [0, 17, 36] {
                let mut values = vec![1.0; 3 * k];
                values[at] = f32::INFINITY;
                values[2 * k + at] = f32::NAN;
                let w = Weights::new(&values, float);
                let mut out = [0.0; 3];
                let x = vec![1.0; k];
                kernel.dot(
                    Rows::new(&x, 1, k, k),
                    w.rows(3, k, k),
                    &mut RowsMut::new(&mut out, 1, 3, 3),
                );
                assert_eq!(out[0], f32::INFINITY);
                assert_eq!(out[1], k as f32);
                assert!(out[2].is_nan());
            }
        }
    }
}

#[test]
fn empty_operands() {
    for kernel in kernels() {
        for (m, n, k) in [(0, 4, 8), (4, 0, 8), (4, 4, 0), (0, 0, 0)] {
            let mut out = vec![1.0; m * n];
            let x = Rows::new(&[], if k == 0 { m } else { 0 }, k, k);
            let x = if m > 0 && k > 0 { Rows::new(&[1.0; 32], m, k, k) } else { x };
            let bytes = vec![0; n * k * 4];
            let w = WeightRows::new(&bytes, Float::F32, n, k, k);
            kernel.dot(x, w, &mut RowsMut::new(&mut out, m, n, n));
            assert!(out.iter().all(|v| *v == 0.0), "no products: the sum is zero");
        }
    }
}

#[test]
fn views_refuse_what_is_not_there() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let refused = |f: &mut dyn FnMut()| catch_unwind(AssertUnwindSafe(f)).is_err();
    let x = [0.0; 8];
    assert!(refused(&mut || _ = Rows::new(&x, 3, 3, 3)));
    assert!(refused(&mut || _ = Rows::new(&x, usize::MAX, 1, 2)));
    assert!(refused(&mut || _ = WeightRows::new(&[0; 15], Float::Bf16, 2, 4, 4)));
    assert!(refused(&mut || _ = RowsMut::new(&mut x.clone(), 2, 4, 3)));
    assert!(refused(&mut || _ = Rows::new(&x, 2, 4, 4).slice(1..3)));
    let out = &mut [0.0; 8];
    let mut out = RowsMut::new(out, 2, 4, 4);
    assert!(refused(&mut || _ = out.window(0..2, 3..5)));
    for blocks in [[0..2, 1..2], [1..2, 0..1], [0..1, 2..3]] {
        assert!(refused(&mut || _ = out.tiles(&blocks, 4)));
    }
    assert_eq!(out.window(2..2, 4..4).rows(), 0);
}

#[test]
fn tiles_cover_their_blocks_once_even_with_a_pool_that_repeats_items() {
    struct Twice;
    impl crate::pool::ThreadPool for Twice {
        fn threads(&self) -> usize {
            2
        }

        fn run(&self, items: usize, work: crate::pool::Work<'_>) {
            for _ in 0..2 {
                (0..items).for_each(|item| work(crate::pool::Worker::new(0), item));
            }
        }
    }
    let mut data = vec![0.0; 6 * 5];
    let blocks = [0..2, 3..3, 4..5];
    let mut rows = RowsMut::new(&mut data, 6, 5, 5);
    for_each(&Twice, rows.tiles(&blocks, 2), |Tile { block, cols, mut out, .. }| {
        assert_eq!((out.rows(), out.cols()), (blocks[block].len(), cols.len()));
        for i in 0..out.rows() {
            for (value, col) in out.row_mut(i).iter_mut().zip(cols.clone()) {
                *value += (10 * block + col + 1) as f32;
            }
        }
    });
    let row = |block: usize| (0..5).map(move |col| (10 * block + col + 1) as f32);
    let want: Vec<f32> =
        row(0).chain(row(0)).chain([0.0; 10]).chain(row(2)).chain([0.0; 5]).collect();
    assert_eq!(data, want);
}
