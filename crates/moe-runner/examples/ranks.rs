//! One layer on four ranks, threads of this process, with whole experts on each: the same bits as on
//! one. With `comm::mpi::open` in place of `run_ranks`, the ranks are processes.

use std::path::Path;

use moe_runner::prelude::*;

fn main() -> moe_runner::Result<()> {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/deepseek_v3_bf16");
    let path = std::env::args_os().nth(1).map_or(case, Into::into);
    let checkpoint = Checkpoint::open(&path)?;
    let entry = &architecture::layers(&checkpoint)?[0];
    let layer = LoadedLayer::load(&checkpoint, entry)?;
    let (tokens, width) = (10, layer.spec.dims.hidden);
    let hidden: Vec<f32> = (0..tokens * width).map(|i| (i as f32 * 0.1).sin()).collect();

    // every rank calls the same, and gets all rows back
    let run = |sizes: Sizes| {
        let parallel = Parallel { sizes, ..Parallel::default() };
        let outputs = run_ranks(sizes.ranks(), |world| {
            let groups = Groups::new(world.clone(), sizes)?;
            let options = Options::new(ActivationDtype::F32, 1)?;
            let mut runner = RankedRunner::new(&layer, &options, &groups, &parallel)?;
            let batch = Batch { hidden: &hidden, router_logits: None, input_ids: None };
            Ok(runner.forward(&batch)?.output)
        })?;
        Ok::<_, moe_runner::Error>(outputs)
    };
    let one = run(Sizes::default())?;
    let four = run(Sizes { dp: 4, expert_parallel: true, ..Sizes::default() })?;
    assert!(four.iter().all(|rank| rank == &one[0]));
    println!("{}: 4 ranks returned what one did, bit by bit", layer.spec.name);
    Ok(())
}
