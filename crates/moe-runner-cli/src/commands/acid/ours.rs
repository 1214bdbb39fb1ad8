//! `acid run`: the kernels of this program.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use moe_acid::write::{Form, checkpoint};
use moe_acid::{Block, FAMILIES, Family, Readings};
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};

use super::{Line, families, forms, report};
use crate::args::common::{Common, KernelArgs, ThreadArgs};
use crate::checkpoints::Opened;
use crate::choice::LayerChoice;
use crate::interrupt;
use crate::report::Report;

#[derive(clap::Args, Debug)]
pub(super) struct OursArgs {
    /// Architectures: all, or names with commas between.
    #[arg(long, value_name = "NAMES", default_value = "all")]
    family: String,
    /// Number formats of the experts: all, or names with commas between.
    #[arg(long, value_name = "NAMES", default_value = "all")]
    form: String,
    /// Show what was read at each probe, beside what is right.
    #[arg(long)]
    table: bool,
    #[command(flatten)]
    kernel: KernelArgs,
    #[command(flatten)]
    threads: ThreadArgs,
}

pub(super) fn run(args: &OursArgs) -> Result<Report> {
    let common = Common::resolve(&args.kernel, &args.threads.clone().into(), 0)?;
    report(&lines(&families(&args.family)?, &forms(&args.form)?, &common, args.table)?)
}

/// All architectures in bfloat16, for `check`.
pub(super) fn quick(common: &Common) -> Result<Vec<Line>> {
    lines(&FAMILIES.iter().collect::<Vec<_>>(), &[Form::Bf16], common, false)
}

fn lines(
    families: &[&'static Family],
    forms: &[Form],
    common: &Common,
    table: bool,
) -> Result<Vec<Line>> {
    let folder = interrupt::temporary()?;
    let mut lines = Vec::new();
    for family in families {
        let block = Block::new(family);
        for form in forms.iter().filter(|form| form.refuses(family).is_none()) {
            let path = folder.path().join(format!("{}-{}", family.name, form.name()));
            checkpoint(&block, *form, &path)
                .with_context(|| format!("{}: cannot be written", path.display()))?;
            let (kernel, output) = output(&block, &form.opened(&path), common)?;
            let readings = Readings::from_output(&block, &output)
                .map_err(|reason| anyhow!("{} in {}: {reason}", family.name, form.name()))?;
            let engine = format!("{kernel}, {}", form.name());
            lines.push(Line::new(engine, &block, &readings, table));
        }
    }
    Ok(lines)
}

/// The kernel that ran, with the dtype of activations, and the block's output.
fn output(block: &Block, path: &Path, common: &Common) -> Result<(String, Vec<f32>)> {
    let opened = Opened::open(path)?;
    let mut layer = None;
    for entry in opened.select(&LayerChoice::All)? {
        layer = Some(common.quantising(opened.load(entry)?)?);
    }
    let layer = layer.ok_or_else(|| anyhow!("{}: has no layer", path.display()))?;
    let dtype = opened.dtype(common.dtype, &layer);
    let mut runner = MoeRunner::new(layer.ready(&common.options(dtype))?);
    let rows: Vec<f32> = block.embeddings().concat().iter().map(|v| *v as f32).collect();
    let mut output = vec![0.0; rows.len()];
    let done = runner.forward(&ForwardInput::new(Rows::F32(&rows)), RowsMut::F32(&mut output))?;
    output.iter_mut().for_each(|v| *v *= done.output_scale);
    Ok((format!("{} ({})", runner.choice().kernel.name, dtype.name()), output))
}
