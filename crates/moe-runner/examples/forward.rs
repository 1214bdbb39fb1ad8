//! A checkpoint on disk, one layer, hidden states in, output out. Without an argument it takes a
//! small checkpoint of this repository.

use std::path::PathBuf;

use moe_runner::prelude::*;

fn main() -> moe_runner::Result<()> {
    let path = std::env::args_os().nth(1).map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/deepseek_v3_bf16")),
        PathBuf::from,
    );
    let checkpoint = Checkpoint::open(&path)?;
    let entry = &architecture::layers(&checkpoint)?[0];
    let layer = LoadedLayer::load(&checkpoint, entry)?;
    let mut runner = MoeRunner::new(layer.ready(&Options::new(ActivationDtype::F32, 2)?)?);

    let (tokens, width) = (4, entry.spec.dims.hidden);
    let hidden: Vec<f32> = (0..tokens * width).map(|i| (i as f32 * 0.1).sin()).collect();
    let mut output = vec![0.0f32; tokens * width];
    runner.forward(&ForwardInput::new(Rows::F32(&hidden)), RowsMut::F32(&mut output))?;

    println!("{}, with {}: {}", entry.spec.name, runner.choice().kernel.name, runner.choice().why);
    println!("output [{tokens}, {width}] begins {:.4?}", &output[..4]);
    Ok(())
}
