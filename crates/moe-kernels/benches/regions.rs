//! What a parallel region costs beside its work: `cargo bench -p moe-kernels --bench regions`.
//!
//! For 1, 2, 4, … threads, in microseconds: a region of the pool with one item a thread, regions over
//! an iterator of many items, and regions over tiles, empty ones and such as take a microsecond.

use std::hint::{black_box, spin_loop};
use std::time::{Duration, Instant};

use moe_kernels::isa::physical_cores;
use moe_kernels::pool::Pool;
use moe_kernels::region::{for_each, for_each_tile};
use moe_kernels::rows::RowsMut;

fn main() {
    let cores = physical_cores();
    println!(
        "threads  one item each  96 items  256 items  96 tiles  256 tiles  256 of 1 us (ideal)"
    );
    for threads in std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n <= cores) {
        let pool = Pool::new(threads).expect("threads start");
        let each = median(|| pool.run(threads, &|_, item| _ = black_box(item)));
        let (mut out, mut busy_out) = (vec![0.0; 256], vec![0.0; 256]);
        let mut tiles = |count| {
            median(|| {
                let mut rows = RowsMut::new(&mut out, count, 1, 1);
                for_each_tile(&pool, &mut [], &rows.even_tiles(1, 1), |_, tile| {
                    _ = black_box(tile)
                });
            })
        };
        let items = |items| median(|| for_each(&pool, 0..items, |item| _ = black_box(item)));
        let busy = median(|| {
            let mut rows = RowsMut::new(&mut busy_out, 256, 1, 1);
            let tiles = rows.even_tiles(1, 1);
            for_each_tile(&pool, &mut [], &tiles, |_, _| spin(Duration::from_micros(1)));
        });
        println!(
            "{threads:7}  {each:13.2}  {:8.1}  {:9.1}  {:8.1}  {:9.1}  {busy:11.1} ({:.1})",
            items(96),
            items(256),
            tiles(96),
            tiles(256),
            256.0 / threads as f64
        );
    }
}

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        spin_loop();
    }
}

/// Of a thousand calls, each after the one before, in microseconds.
fn median(mut region: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..1000)
        .map(|_| {
            let start = Instant::now();
            region();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
