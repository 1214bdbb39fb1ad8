//! A forward pass allocates nothing once the buffers have grown, and they grow no further than
//! `workspace_bytes` says before anything runs. Measured, on every option of a layer.

mod layers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use layers::{kernels, options, rows, shared, variants};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::runner::{
    ForwardInput, MoeRunner, MoeRunnerInterface, Options, SharedPool, Workspaces,
};
use moe_runner::shared_experts::SharedOrder;
use moe_runner::weights::{FloatType, random_layer};

/// Counts allocations, the bytes that are allocated, and the most that ever were.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test: allocations of others would be counted too.
#[test]
fn a_steady_state_allocates_nothing_and_memory_stays_within_the_workspace() {
    let mut problems = Vec::new();
    for threads in [1, 3] {
        every_option(threads, &mut problems);
    }
    many_layers(&mut problems);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

fn every_option(threads: usize, problems: &mut Vec<String>) {
    let pool = Options::new(F32, threads).unwrap().pool;
    begin(&pool);
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        for kernel in kernels().into_iter().filter(|name| name.starts_with("cpu")) {
            for (order, micro_batches) in
                [(SharedOrder::NoOverlap, 1), (SharedOrder::DuringCombine, 3)]
            {
                let options = Options {
                    kernel: Some(kernel.into()),
                    pool: pool.clone(),
                    workspaces: Workspaces::new(),
                    ..options(None, F32)
                };
                let mut runner = MoeRunner::new(layer.ready(&options).unwrap())
                    .with_order(order)
                    .with_micro_batches(micro_batches);
                let hidden = rows(F32, 40, 48, 3);
                let mut out = vec![0.0; hidden.len()];
                let before = NOW.load(Ordering::Relaxed);
                PEAK.store(before, Ordering::Relaxed);
                let mut calls = [0; 4];
                for (calls, tokens) in calls.iter_mut().zip([40, 40, 40, 7]) {
                    let input = ForwardInput::new(Rows::F32(&hidden[..tokens * 48]));
                    let start = CALLS.load(Ordering::Relaxed);
                    runner.forward(&input, RowsMut::F32(&mut out[..tokens * 48])).unwrap();
                    *calls = CALLS.load(Ordering::Relaxed) - start;
                }
                let grown = PEAK.load(Ordering::Relaxed) - before;
                let stated = runner.workspace_bytes(40);
                let what = format!(
                    "{name}, {kernel}, {threads} threads, {order:?}, {micro_batches} micro-batches"
                );
                if calls[1..] != [0, 0, 0] {
                    problems.push(format!("{what}: allocations {calls:?}"));
                }
                if grown > stated || stated > 2 * grown {
                    problems.push(format!("{what}: {grown} bytes, {stated} were stated"));
                }
            }
        }
    }
}

/// Returns when every thread of the pool has begun: what it allocates then is no pass's, and a busy machine
/// may let it begin late.
fn begin(pool: &SharedPool) {
    let all = Barrier::new(pool.threads());
    pool.run(pool.threads(), &|_, _| {
        all.wait();
    });
}

/// Forty-eight layers, one after the other, twice: one workspace, and nothing beside it that grows
/// with the layers but what each exchange keeps of a batch, four bytes a slot and a few besides.
fn many_layers(problems: &mut Vec<String>) {
    const LAYERS: usize = 48;
    const TOKENS: usize = 256;
    let options = Options { workspaces: Workspaces::new(), ..options(Some("cpu_portable"), F32) };
    begin(&options.pool);
    let mut spec = variants().swap_remove(0).1;
    spec.shared = Some(shared());
    let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
    let mut runners: Vec<MoeRunner> =
        (0..LAYERS).map(|_| MoeRunner::new(layer.ready(&options).unwrap())).collect();
    let hidden = rows(F32, TOKENS, 48, 3);
    let mut out = vec![0.0; hidden.len()];
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let mut pass = |runner: &mut MoeRunner| {
        let start = CALLS.load(Ordering::Relaxed);
        let input = ForwardInput::new(Rows::F32(&hidden));
        runner.forward(&input, RowsMut::F32(&mut out)).unwrap();
        CALLS.load(Ordering::Relaxed) - start
    };
    runners.iter_mut().for_each(|runner| _ = pass(runner));
    let calls: usize = runners.iter_mut().map(pass).sum();
    let grown = PEAK.load(Ordering::Relaxed) - before;
    let one = runners[0].workspace_bytes(TOKENS);
    let kept = LAYERS * (TOKENS * spec.router.top_k * 4 + 128);
    if calls > 0 {
        problems.push(format!("{LAYERS} layers: {calls} allocations"));
    }
    if grown > one + kept || grown < one / 2 {
        problems.push(format!("{LAYERS} layers: {grown} bytes, {one} were stated for one"));
    }
}
