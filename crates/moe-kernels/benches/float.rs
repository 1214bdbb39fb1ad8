//! The float product against this machine's limits, and the pool's overhead.
//!
//! `cargo bench -p moe-kernels --bench float`. Prints the best of repeated runs.

use std::time::{Duration, Instant};

use moe_kernels::isa::{Isa, physical_cores};
use moe_kernels::kernel::{Activation, Float, Kernel, Rows, RowsMut, WeightRows};
use moe_kernels::limits::Limits;
use moe_kernels::pool::{Pool, ThreadPool};
use moe_kernels::region::for_each;

/// The shape of one expert's projection.
const K: usize = 2048;
const N: usize = 768;

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

fn main() {
    let threads = physical_cores();
    println!("{threads} threads; x [m, {K}], each of the experts' weights [{N}, {K}]");
    for threads in [1, threads] {
        let pool = Pool::new(threads).expect("the operating system starts threads");
        for isa in Isa::available().into_iter().rev() {
            report(&pool, Kernel::new(isa).expect("it is available"));
        }
        let run = best(Duration::from_millis(200), || pool.run(2 * threads, &|_, _| ()));
        println!("{threads} threads: an empty region of {} items {:.2} µs", 2 * threads, run * 1e6);
    }
}

fn report(pool: &Pool, kernel: Kernel) {
    let limits = Limits::measure(kernel, pool, Duration::from_secs(1));
    let (isa, threads) = (kernel.isa(), pool.threads());
    println!(
        "\n{isa}, {threads} threads: reads {:.1} GB/s, {:.1} GFLOP/s f32",
        limits.read_gbps, limits.f32_gflops
    );
    for float in [Float::Bf16, Float::F16, Float::F32] {
        // Weights of 256 MiB, far beyond the caches.
        let experts = (256 << 20) / (N * K * float.size());
        let one = vec![0x3c; experts * N * K * float.size()];
        for m in [1, 2, 4, 8, 64, 512] {
            // Few tokens read all of the weights once; many stay with one expert's.
            let rows = if m < 8 { experts * N } else { N };
            let w = WeightRows::new(&one, float, rows, K, K);
            let x = vec![0.5; m * K];
            let x = Rows::new(&x, m, K, K);
            let mut out = vec![0.0; m * rows];
            let time = best(Duration::from_millis(200), || {
                product(kernel, pool, x, w, &mut out);
            });
            let gbps = (rows * K * float.size()) as f64 / time / 1e9;
            let gflops = 2.0 * (m * rows * K) as f64 / time / 1e9;
            println!(
                "  {float:?} m={m:3}: {gbps:6.1} GB/s ({:3.0} %) {gflops:7.1} GFLOP/s ({:3.0} %)",
                100.0 * gbps / limits.read_gbps,
                100.0 * gflops / limits.f32_gflops
            );
        }
    }
    let (values, mut gate) = (vec![0.7; 1 << 14], vec![0.5; 1 << 14]);
    for activation in [Activation::Silu, Activation::Gelu] {
        let time = best(Duration::from_millis(50), || {
            kernel.activate(activation, &mut gate, Some(&values));
        });
        println!("  {activation:?}: {:.2} ns/element", time * 1e9 / gate.len() as f64);
    }
}

/// The whole product, some weight rows at a time.
fn product(kernel: Kernel, pool: &dyn ThreadPool, x: Rows, w: WeightRows, out: &mut [f32]) {
    let (m, n) = (x.rows(), w.rows());
    let block = 0..m;
    let mut out = RowsMut::new(out, m, n, n);
    let tiles = out.tiles(std::slice::from_ref(&block), if m < 8 { 64 } else { 48 });
    for_each(pool, tiles, |mut tile| kernel.dot(x, w.slice(tile.cols), &mut tile.out));
}
