//! Tile registers in plain Rust: the products on them, where the processor has none, and what vector registers
//! have to equal.

use std::arch::x86_64::__m512i;

use proptest::prelude::*;

use super::cases::{Numbers, View, cases};
use super::*;
use crate::gemm::avx512::Avx512;
use crate::gemm::pairs;
use crate::gemm::panel::Panel;
use crate::gemm::registers::{Config, Tiles};
use crate::gemm::tiles::{self, UNITS};
use crate::gemm::turns;
use crate::pack::Group;

/// Eight registers of sixteen rows of sixteen words.
struct Model {
    rows: [u8; 16],
    row_bytes: [u16; 16],
    tiles: [[[u32; 16]; 16]; 8],
}

impl Model {
    fn new() -> Model {
        Model { rows: [0; 16], row_bytes: [0; 16], tiles: [[[0; 16]; 16]; 8] }
    }

    /// Rows and words of a row.
    fn shape(&self, tile: usize) -> (usize, usize) {
        let (rows, words) = (usize::from(self.rows[tile]), usize::from(self.row_bytes[tile]) / 4);
        assert!(rows > 0 && words > 0, "tile {tile} is not configured");
        (rows, words)
    }
}

impl Tiles for Model {
    unsafe fn configure(&mut self, config: &Config) {
        (self.rows, self.row_bytes) = (config.rows, config.row_bytes);
    }

    unsafe fn zero<const T: usize>(&mut self) {
        self.tiles[T] = [[0; 16]; 16];
    }

    unsafe fn load<const T: usize>(&mut self, at: *const u8, stride: usize) {
        let (rows, words) = self.shape(T);
        self.tiles[T] = [[0; 16]; 16];
        for row in 0..rows {
            for word in 0..words {
                // SAFETY: the caller's.
                let bits = unsafe { at.add(row * stride).cast::<u32>().add(word).read_unaligned() };
                self.tiles[T][row][word] = bits;
            }
        }
    }

    unsafe fn store<const T: usize>(&mut self, at: *mut f32, stride: usize) {
        let (rows, words) = self.shape(T);
        for row in 0..rows {
            for word in 0..words {
                let value = f32::from_bits(self.tiles[T][row][word]);
                // SAFETY: the caller's.
                unsafe { at.byte_add(row * stride).add(word).write_unaligned(value) };
            }
        }
    }

    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        let ((rows, columns), (a_rows, pairs)) = (self.shape(C), self.shape(A));
        assert_eq!((a_rows, self.shape(B)), (rows, (pairs, columns)), "shapes of a product");
        let halves = |word: u32| [word << 16, word & !0xFFFF].map(f32::from_bits);
        for row in 0..rows {
            for column in 0..columns {
                // Even and odd columns have sums of their own, added at the end.
                let mut sums = [0.0f32; 2];
                for pair in 0..pairs {
                    let [a, b] =
                        [self.tiles[A][row][pair], self.tiles[B][pair][column]].map(halves);
                    sums = [0, 1].map(|i| normal(normal(a[i]).mul_add(normal(b[i]), sums[i])));
                }
                let before = normal(f32::from_bits(self.tiles[C][row][column]));
                let sum = normal(before + normal(sums[0] + sums[1]));
                self.tiles[C][row][column] = sum.to_bits();
            }
        }
    }
}

/// Tile products take numbers below the normal ones for zero, before and after.
fn normal(value: f32) -> f32 {
    if value.is_subnormal() { 0.0f32.copysign(value) } else { value }
}

/// The place of a set of features in the table's macro.
mod model {
    use super::*;

    pub(super) const fn of<P: Panel<Avx512, Value = __m512i>>() -> &'static [Shape] {
        const {
            &[
                Shape { rows: Shape::ANY, panels: 4, of: 4, units: UNITS, run: product::<P, 4, 2> },
                Shape { rows: Shape::ANY, panels: 1, of: 1, units: 1, run: product::<P, 1, 1> },
            ]
        }
    }

    unsafe fn product<P, const W: usize, const N: usize>(args: &Args<'_>)
    where
        P: Panel<Avx512, Value = __m512i>,
    {
        // SAFETY: the caller's.
        unsafe { tiles::product::<Model, P, W, N>(args, &mut Model::new()) }
    }
}

/// Another one: any number of rows on vector registers, where a block is one group.
mod vectors {
    use super::*;

    pub(super) const fn of<P: Panel<Avx512, Value = __m512i>>() -> &'static [Shape] {
        const {
            &[
                Shape { rows: Shape::ANY, panels: 4, of: 4, units: UNITS, run: product::<P, 4> },
                Shape { rows: Shape::ANY, panels: 1, of: 1, units: 1, run: product::<P, 1> },
            ]
        }
    }

    unsafe fn product<P, const W: usize>(args: &Args<'_>)
    where
        P: Panel<Avx512, Value = __m512i>,
    {
        // SAFETY: the caller's.
        unsafe {
            match args.layout.group {
                Group::Block => turns::product::<P, W>(args),
                Group::Sixteen | Group::ThirtyTwo => {
                    tiles::product::<Model, P, W, 1>(args, &mut Model::new());
                }
            }
        }
    }
}

static MODEL: [Gemm; 10] =
    pair_entries!(model, TileBf16, "model", Features::V4.with(Features::AVX512_VBMI));
static VECTORS: [Gemm; 10] =
    pair_entries!(vectors, TileBf16, "vectors", Features::V4.with(Features::AVX512_VBMI));

/// The processor's tiles, where it has them, the model, and vector registers.
pub(super) fn entries(view: &View) -> Vec<&'static Gemm> {
    let all = AMX_BF16.iter().chain(&MODEL).chain(&VECTORS);
    let holds = crate::pack::holds(OperandKind::TileBf16, view);
    let reads = |gemm: &&Gemm| gemm.codes() == crate::pack::codes(view);
    all.filter(|gemm| holds && reads(gemm) && gemm.runs_here()).collect()
}

/// Several units at a time, and more rows than sums are kept of: as one by one.
#[test]
fn many_rows_of_several_units() {
    let mut numbers = Numbers(5);
    let (n, m) = (UNITS * UNIT + UNIT + 20, 300);
    for (name, view) in cases(&mut numbers, n, 40) {
        let x = numbers.normal(m * view.cols());
        for gemm in entries(&view) {
            let whole = bits(&product(gemm, &view, &x, m, (0, 0)));
            for cut in [(1, 0), (2, 150)] {
                let parts = bits(&product(gemm, &view, &x, m, cut));
                assert!(parts == whole, "{name} by {gemm:?}, cut at {cut:?}");
            }
        }
    }
}

/// Sums go on where there are more columns than are multiplied without a look at them.
#[test]
fn many_columns() {
    let mut numbers = Numbers(9);
    let (n, m) = (UNIT + 6, 20);
    for (name, view) in cases(&mut numbers, n, 1100) {
        let x = numbers.normal(m * view.cols());
        let rounded: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        for gemm in entries(&view) {
            let whole = product(gemm, &view, &x, m, (0, 0));
            check_against_float64(&name, &view, &rounded, &whole).unwrap();
            let cut = product(gemm, &view, &x, m, (1, 4));
            assert!(bits(&cut) == bits(&whole), "{name} by {gemm:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// All formats, any shape: near float64, and the same bits however rows and units are cut.
    #[test]
    fn tiles_are_right(
        seed: u64,
        n in prop_oneof![1..=20usize, 1..150usize],
        k in prop_oneof![1..=40usize, 1..300usize, Just(512)],
        m in prop_oneof![1..=4usize, 10..70usize],
        unit_cut in 0..3usize,
        row_cut in 0..40usize,
    ) {
        let mut numbers = Numbers(seed);
        for (name, view) in cases(&mut numbers, n, k) {
            let x = numbers.normal(m * view.cols());
            let rounded: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            for gemm in entries(&view) {
                let whole = product(gemm, &view, &x, m, (0, 0));
                check_against_float64(&name, &view, &rounded, &whole)?;
                let cut = product(gemm, &view, &x, m, (unit_cut, row_cut));
                prop_assert_eq!(bits(&cut), bits(&whole), "{} by {:?}", name, gemm);
            }
        }
    }

    /// The processor's tiles and vector registers give the model's bits, also where sums are below the normal numbers.
    #[test]
    fn the_processor_is_as_modelled(
        seed: u64,
        n in 1..100usize,
        k in 1..300usize,
        m in 1..40usize,
        scale in prop_oneof![Just(1.0), Just(1e-37f32)],
    ) {
        let mut numbers = Numbers(seed);
        for (name, view) in cases(&mut numbers, n, k) {
            let x: Vec<f32> = numbers.normal(m * view.cols()).iter().map(|x| x * scale).collect();
            let all = entries(&view);
            let product = |gemm: &&'static Gemm| bits(&product(gemm, &view, &x, m, (0, 0)));
            let mut products = all.iter().map(product);
            let first = products.next();
            prop_assert!(products.all(|bits| Some(&bits) == first.as_ref()), "{} of {:?}", name, all);
        }
    }
}
