//! What this machine can do at most: the yardstick for every timing.
//!
//! A layer with few tokens is bound by reading its weights, one with many by multiply-adds. Both
//! limits are measured with the threads and the CPU features that the kernels use.

use std::fs;
use std::time::{Duration, Instant};

use crate::kernel::Kernel;
use crate::pack::Memory;
use crate::pool::Pool;
use crate::region::for_each;

/// The limits of this machine for one set of CPU features and number of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Memory read by all threads together, from a buffer far larger than the caches: 10⁹ bytes/s.
    pub read_gbps: f64,
    /// f32 multiply-adds of all threads together, in registers: 10⁹ operations/s, two for each.
    pub f32_gflops: f64,
    /// bf16 dot products, likewise, where the CPU has them.
    pub bf16_gflops: Option<f64>,
    /// Dot products of 8-bit integers, likewise.
    pub int8_gflops: Option<f64>,
    /// bf16 tile products, likewise.
    pub tile_gflops: Option<f64>,
    /// Threads that took part.
    pub threads: usize,
}

/// Elements that a thread reads at a time: 1 MiB.
const CHUNK: usize = 1 << 18;

impl Limits {
    /// Measures for about `budget` (a second is ample): the best of repeated runs, because other
    /// work on the machine only ever makes them slower. Allocates a buffer of at least 256 MiB and
    /// four times the last-level cache, at most 2 GiB.
    pub fn measure(kernel: Kernel, pool: &Pool, budget: Duration) -> Limits {
        Limits {
            read_gbps: read_gbps(kernel, pool, budget / 2),
            f32_gflops: gflops(pool, budget / 4, |rounds| kernel.probe_multiply_add(rounds)),
            bf16_gflops: kernel.probe_dots(1).map(|_| {
                gflops(pool, budget / 4, |rounds| kernel.probe_dots(rounds).unwrap_or_default())
            }),
            int8_gflops: kernel.probe_int8_dots(1).map(|_| {
                gflops(pool, budget / 4, |rounds| {
                    kernel.probe_int8_dots(rounds).unwrap_or_default()
                })
            }),
            tile_gflops: kernel.probe_tiles(1).map(|_| {
                gflops(pool, budget / 4, |rounds| {
                    kernel.probe_tiles(rounds / 16).unwrap_or_default()
                })
            }),
            threads: pool.threads(),
        }
    }
}

fn read_gbps(kernel: Kernel, pool: &Pool, budget: Duration) -> f64 {
    let end = Instant::now() + budget;
    let bytes = last_level_cache().unwrap_or(0).saturating_mul(4).clamp(256 << 20, 2 << 30);
    let chunks = bytes / 4 / CHUNK;
    // The memory of packed weights, in huge pages where the system gives them. Each page is written
    // first by a thread of the pool: untouched memory has no pages of its own, and on a machine with
    // several memories it should lie near its readers.
    let mut data = Memory::zeroed(chunks * CHUNK * 4).expect("memory to read for the limit");
    // SAFETY: any bits are an f32; the memory begins at a cache line.
    let (_, data, _) = unsafe { data.align_to_mut::<f32>() };
    for_each(pool, data.chunks_exact_mut(CHUNK), |chunk| chunk.fill(1.0));
    let best = best_time(end, || {
        pool.run(chunks, &|_, chunk| {
            std::hint::black_box(kernel.probe_read(&data[chunk * CHUNK..][..CHUNK]));
        });
    });
    size_of_val(data) as f64 / best.as_secs_f64() / 1e9
}

fn gflops(pool: &Pool, budget: Duration, probe: impl Fn(usize) -> u64 + Sync) -> f64 {
    // Items of some 50 µs, many to a thread, so that the threads end at about the same time.
    const ROUNDS: usize = 15_000;
    let items = 64 * pool.threads();
    let operations = probe(ROUNDS) * items as u64;
    let best = best_time(Instant::now() + budget, || {
        pool.run(items, &|_, _| {
            probe(ROUNDS);
        });
    });
    operations as f64 / best.as_secs_f64() / 1e9
}

/// The shortest time of `work`, repeated until `end` but at least twice.
fn best_time(end: Instant, mut work: impl FnMut()) -> Duration {
    let mut best = Duration::MAX;
    for run in 0.. {
        if run >= 2 && Instant::now() >= end {
            break;
        }
        let start = Instant::now();
        work();
        best = best.min(start.elapsed());
    }
    best.max(Duration::from_nanos(1))
}

/// Bytes of the last-level cache, where Linux's `/sys` tells.
pub fn last_level_cache() -> Option<usize> {
    (0..8)
        .filter_map(|index| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
            parse_size(&fs::read_to_string(path).ok()?)
        })
        .max()
}

/// A size as `/sys` writes it: `32768K`.
fn parse_size(text: &str) -> Option<usize> {
    let text = text.trim();
    let (digits, unit) = match text.strip_suffix('K') {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix('M').map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Cpu;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("32768K\n"), Some(32 << 20));
        assert_eq!(parse_size("32M"), Some(32 << 20));
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("K"), None);
    }

    /// What the probes claim to have done, they did: all of the buffer, all of the rounds.
    #[test]
    fn probes_do_all_of_the_work() {
        for cpu in Cpu::levels() {
            let kernel = Kernel::new(cpu);
            assert_eq!(kernel.probe_read(&[1.0; 8192]), 8192.0, "{cpu:?}");
            let one = kernel.probe_multiply_add(1);
            assert!(one >= 2 * 8, "{cpu:?}");
            assert_eq!(kernel.probe_multiply_add(100), 100 * one, "{cpu:?}");
        }
        if let Some(one) = Kernel::detect().probe_dots(1) {
            assert_eq!(Kernel::detect().probe_dots(100), Some(100 * one));
        }
        if let Some(one) = Kernel::detect().probe_int8_dots(1) {
            assert_eq!(Kernel::detect().probe_int8_dots(100), Some(100 * one));
        }
    }

    #[test]
    fn limits_are_those_of_a_machine() {
        let pool = Pool::new(2).unwrap();
        let limits = Limits::measure(Kernel::detect(), &pool, Duration::ZERO);
        assert_eq!(limits.threads, 2);
        // Between a very slow machine and more than any has.
        assert!((0.01..1e5).contains(&limits.read_gbps), "{limits:?}");
        assert!((0.01..1e6).contains(&limits.f32_gflops), "{limits:?}");
    }
}
