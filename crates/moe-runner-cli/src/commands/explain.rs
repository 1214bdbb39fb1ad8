//! `explain`: which kernel runs each layer, why, and what keeps every other one from it.

use anyhow::Result;
use moe_runner::experts::{KERNELS, KernelDesc};
use moe_runner::oracle::{Change, Machine, Reason, Rejection, Request, failing_conditions};
use moe_runner::runner::Options;
use moe_runner::spec::ActivationFormat;
use moe_runner::weights::LoadedLayer;
use serde::Serialize;

use crate::args::{Common, ExplainArgs};
use crate::checkpoints::{Opened, ranges};
use crate::failure::unusable;
use crate::report::Report;
use crate::report::table::{Tone, toned};

#[derive(Serialize)]
pub(super) struct ExplainJson {
    checkpoint: String,
    /// The machine that is meant.
    pub(super) chosen_for: String,
    layers: Vec<LayerJson>,
}

#[derive(Serialize)]
struct LayerJson {
    layer: usize,
    #[serde(flatten)]
    answer: Answer,
}

/// The oracle's answer for one layer.
#[derive(PartialEq, Serialize)]
pub(super) struct Answer {
    pub(super) dtype: &'static str,
    /// `None`: no kernel can run the layer, or the named one cannot.
    pub(super) chosen: Option<&'static str>,
    pub(super) why: String,
    pub(super) able: Vec<Able>,
    pub(super) rejected: Vec<Rejected>,
}

/// A kernel that could run too.
#[derive(PartialEq, Serialize)]
pub(super) struct Able {
    pub(super) kernel: &'static str,
    pub(super) reason: String,
}

/// A kernel that cannot run.
#[derive(PartialEq, Serialize)]
pub(super) struct Rejected {
    pub(super) kernel: &'static str,
    pub(super) reasons: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &ExplainArgs, common: &Common) -> Result<Report> {
    let json = explain(args, common)?;
    let ok = json.layers.iter().all(|layer| layer.answer.chosen.is_some());
    Report::new(ok, text(&json), &json)
}

/// Asks the oracle about every layer.
pub(super) fn explain(args: &ExplainArgs, common: &Common) -> Result<ExplainJson> {
    let machine = match &args.machine {
        Some(name) => Machine::named(name).map_err(|error| unusable(error.to_string()))?,
        None => Machine::detect_all(),
    };
    let opened = Opened::open_outline(&args.of.checkpoint)?;
    let mut layers = Vec::new();
    for entry in opened.select(&args.of.layers)? {
        let layer = common.quantising(opened.load(entry)?)?;
        let options = Options {
            machine: machine.clone(),
            ..common.options(opened.dtype(common.dtype, &layer))
        };
        layers.push(LayerJson { layer: entry.spec.index, answer: ask(&layer, &options) });
    }
    let checkpoint = args.of.checkpoint.display().to_string();
    Ok(ExplainJson { checkpoint, chosen_for: machine.name, layers })
}

impl ExplainJson {
    /// Answers, and the layers that have them.
    pub(super) fn groups(&self) -> Vec<(&Answer, Vec<usize>)> {
        let mut groups: Vec<(&Answer, Vec<usize>)> = Vec::new();
        for layer in &self.layers {
            match groups.iter_mut().find(|(answer, _)| **answer == layer.answer) {
                Some((_, layers)) => layers.push(layer.layer),
                None => groups.push((&layer.answer, vec![layer.layer])),
            }
        }
        groups
    }
}

fn ask(layer: &LoadedLayer, options: &Options) -> Answer {
    let dtype = options.dtype.name();
    let able = |(kernel, reason): (&'static KernelDesc, String)| Able {
        kernel: kernel.name,
        reason: format!("{reason} (--kernel {})", kernel.name),
    };
    match layer.choose(options) {
        Ok(choice) => Answer {
            dtype,
            chosen: Some(choice.kernel.name),
            why: format!("{}: {}", choice.why, choice.kernel.summary),
            able: choice.able.into_iter().map(able).collect(),
            rejected: choice.rejected.iter().map(rejected).collect(),
        },
        Err(error) => {
            let request = Request { device: options.device, ..Request::of(layer, options.dtype) };
            let all = KERNELS.iter().map(|kernel| Rejection {
                kernel,
                reasons: failing_conditions(kernel, &request, &options.machine),
            });
            let (others, unable): (Vec<_>, Vec<_>) = all.partition(|r| r.reasons.is_empty());
            let only_named =
                |r: Rejection| able((r.kernel, "could run, but only when named".into()));
            Answer {
                dtype,
                chosen: None,
                why: error.to_string(),
                able: others.into_iter().map(only_named).collect(),
                rejected: unable.iter().map(rejected).collect(),
            }
        }
    }
}

fn rejected(rejection: &Rejection) -> Rejected {
    let reason = |reason: &Reason| format!("{} ({})", reason.what, fix(&reason.fix));
    Rejected {
        kernel: rejection.kernel.name,
        reasons: rejection.reasons.iter().map(reason).collect(),
    }
}

/// A change as one types it, where there is an option for it.
fn fix(change: &Change) -> String {
    match change {
        Change::Device(device) => format!("--device {}", device.name()),
        Change::Dtype(dtypes) => {
            let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
            format!("--dtype {}", names.join(" or "))
        }
        Change::Activations { from: ActivationFormat::Unquantised, of }
            if of.scheme.rows.contains(&ActivationFormat::Int8Group) =>
        {
            "--int8-activations".into()
        }
        change => change.to_string(),
    }
}

fn text(json: &ExplainJson) -> String {
    let mut out = String::new();
    for (answer, layers) in json.groups() {
        let noun = if layers.len() == 1 { "layer" } else { "layers" };
        let title = format!("{noun} {}, {} activations", ranges(&layers), answer.dtype);
        out += &format!("{}\n", toned(Tone::Title, &title));
        let width = KERNELS.iter().map(|kernel| kernel.name.len()).max().unwrap_or(0);
        let mut line = |mark: &str, kernel: &str, what: &str| {
            out += &format!("  {mark} {kernel:width$}  {what}\n");
        };
        match answer.chosen {
            Some(chosen) => line("→", chosen, &answer.why),
            None => line("✗", "none", "no kernel is chosen"),
        }
        for able in &answer.able {
            line("·", able.kernel, &able.reason);
        }
        for rejected in &answer.rejected {
            for (i, reason) in rejected.reasons.iter().enumerate() {
                let (mark, name) = if i == 0 { ("✗", rejected.kernel) } else { (" ", "") };
                line(mark, name, reason);
            }
        }
        out += "\n";
    }
    out + "→ runs   · could run   ✗ cannot run (and what would change that)\n"
}
