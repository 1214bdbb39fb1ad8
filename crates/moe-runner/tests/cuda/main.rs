//! Whole layers on an NVIDIA GPU: what was recorded, every option, every format, every way in which rows
//! and routing come. Without a GPU the tests say that they skip; with one, whatever is missing is a
//! failure.

#[path = "../cases/mod.rs"]
mod cases;
#[path = "../layers/mod.rs"]
mod layers;

mod fast;
mod formats;
mod inputs;
mod on_device;
mod options;
mod ranks;
mod recorded;
#[path = "../comm_suite/mod.rs"]
mod suite;

use std::sync::{Mutex, MutexGuard, PoisonError};

use moe_kernels::numerics::quantise::Qdq;
use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::{MoeRunner, Options};
use moe_runner::spec::Granularity;
use moe_runner::weights::{Element, LoadedLayer, RandomFormat, RandomScaled, ScaleType};

const KERNEL: &str = "cuda_f32";

/// One test at a time: layers on one GPU share a stream, and what is captured on it must be one test's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Options for the first GPU and the kernel that takes everything; `None`, and the reason told, where there is none.
fn gpu(dtype: ActivationDtype) -> Option<Options> {
    match layers::options(Some(KERNEL), dtype).on_gpu(0) {
        Ok(options) => Some(options),
        Err(reason) => {
            println!("skipped, no GPU here: {reason}");
            None
        }
    }
}

fn runner(layer: &LoadedLayer, options: &Options) -> MoeRunner {
    let ready = layer.ready(options).unwrap_or_else(|error| panic!("{error}"));
    let runner = MoeRunner::new(ready);
    assert_eq!(runner.choice().kernel.name, KERNEL);
    runner
}

/// Random codes and scales.
fn scaled(
    element: Element,
    scales: ScaleType,
    granularity: Granularity,
    block: [usize; 2],
    input: Option<Qdq>,
) -> RandomFormat {
    RandomFormat::Scaled(RandomScaled { element, scales, granularity, block, input })
}
