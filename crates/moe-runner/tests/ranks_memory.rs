//! A forward pass of a layer that is split over ranks allocates nothing once the buffers have grown,
//! on any rank and any thread, with every exchange. Measured.

mod layers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use layers::{options, rows, shared, splits};
use moe_kernels::numerics::quantise::Qdq;
use moe_runner::comm::{At, Groups, Step, run_ranks};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::parallel::{Parallel, deal_rows};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options, Workspaces};
use moe_runner::spec::Granularity;
use moe_runner::weights::{
    Element, FloatType, LoadedLayer, RandomFormat, RandomScaled, ScaleType, random_layer,
};

/// Counts the allocations of all threads.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const AT: At<'static> = At { layer: "test", step: Step::Finish };
const TOKENS: usize = 40;
const WIDTH: usize = 48;

/// How often three passes are measured until they allocate nothing. A rank that is ahead of the others
/// may need one message more than ever before; what a pass does each time shows every time.
const TRIES: usize = 30;

/// The fewest allocations of all ranks in three passes.
fn allocations(layer: &LoadedLayer, threads: usize, parallel: &Parallel) -> usize {
    let hidden = rows(F32, TOKENS, WIDTH, 3);
    let counts = run_ranks(parallel.sizes.ranks(), |world| {
        let groups = Groups::new(world.clone(), parallel.sizes)?;
        // of each rank's own: of what ranks share, each gets what the others leave
        let pool = Options::new(F32, threads)?.pool;
        let options = &Options { pool, workspaces: Workspaces::new(), ..options(None, F32) };
        let mut runner = MoeRunner::on_rank(layer, options, &groups, parallel)?;
        let mine = deal_rows(TOKENS, parallel.sizes)[world.rank()].clone();
        let mine = &hidden[mine.start * WIDTH..mine.end * WIDTH];
        let mut out = vec![0.0; mine.len()];
        let mut passes = |count: usize| -> moe_runner::Result<()> {
            for _ in 0..count {
                runner.forward(&ForwardInput::new(Rows::F32(mine)), RowsMut::F32(&mut out))?;
            }
            world.barrier(AT)
        };
        let mut fewest = usize::MAX;
        for _ in 0..TRIES {
            passes(0)?;
            let before = CALLS.load(Ordering::Relaxed);
            passes(0)?;
            passes(3)?;
            let calls = CALLS.load(Ordering::Relaxed) - before;
            // nobody goes on before all have read
            fewest = fewest
                .min(world.all_gather(AT, [calls as u64])?.into_iter().max().unwrap_or(0) as usize);
            if fewest == 0 {
                break;
            }
        }
        Ok(fewest)
    });
    counts.unwrap().into_iter().max().unwrap()
}

/// One test: allocations of others would be counted too.
#[test]
fn a_steady_state_of_ranks_allocates_nothing() {
    let mut spec = layers::plain();
    spec.shared = Some(shared());
    let floats = random_layer(&spec, FloatType::F32, 7).unwrap();
    let codes = |input| {
        let format = RandomFormat::Scaled(RandomScaled {
            element: Element::Int8,
            scales: ScaleType::F32,
            granularity: Granularity::Channel,
            block: [0, 0],
            input: Some(input),
        });
        random_layer(&spec, format, 7).unwrap()
    };
    // rows travel as codes; slices agree on the scales of whole rows
    let codes = codes(Qdq::Int8Token);
    let mut problems = Vec::new();
    for threads in [1, 3] {
        for (name, parallel) in splits() {
            if parallel.sizes.ranks() > 4 {
                continue;
            }
            for (what, layer) in [("floats", &floats), ("codes", &codes)] {
                let calls = allocations(layer, threads, &parallel);
                if calls > 0 {
                    problems.push(format!("{what}, {threads} threads, {name}: {calls}"));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
