//! Loops that do nothing but what a kernel is limited by: reading memory, and multiply-adds.

use std::hint::black_box;

use super::lanes::Lanes;

/// The probes of an instruction set. Unsafe to call: the CPU must have it.
#[derive(Clone, Copy)]
pub(super) struct Probes {
    /// Reads all elements; the sum of some of them keeps the compiler from leaving that out.
    pub(super) read: unsafe fn(&[f32]) -> f32,
    /// Multiply-adds of f32.
    pub(super) multiply_add: Rounds,
}

/// Does so many rounds of arithmetic in registers; returns the number of operations.
pub(super) type Rounds = unsafe fn(usize) -> u64;

/// Four rows of a page at a time, with the next four asked for: the order in which a kernel reads
/// weights, and the fastest of those tried.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn read<S: Lanes>(data: &[f32]) -> f32 {
    const ROWS: usize = 4;
    const ROW: usize = 1024;
    // SAFETY: `i` and `j` stay inside the chunk of whole rows.
    unsafe {
        let mut sums = [S::splat(0.0); ROWS];
        for chunk in data.chunks_exact(ROWS * ROW) {
            for i in (0..ROW).step_by(S::COUNT) {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let at: *const u8 = chunk.as_ptr().add(j * ROW + i).cast();
                    S::prefetch(at.wrapping_add(size_of_val(chunk)));
                    *sum = S::add(*sum, S::load_f32(at));
                }
            }
        }
        S::sums(sums).iter().sum()
    }
}

/// `CHAINS` independent sums: enough to hide the latency of a multiply-add, and as many as fit the
/// registers.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn multiply_add<S: Lanes, const CHAINS: usize>(rounds: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe {
        let (factor, step) = (S::splat(black_box(0.999)), S::splat(black_box(0.001)));
        let mut sums = [S::splat(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = S::mul_add(*sum, factor, step);
            }
        }
        let mut total = S::splat(0.0);
        for sum in sums {
            total = S::add(total, sum);
        }
        black_box(S::sums([total; 4]));
    }
    2 * (rounds * CHAINS * S::COUNT) as u64
}
