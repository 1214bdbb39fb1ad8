//! The page: its sections in order, and what they begin with.

use super::html::{escape, facts, table};
use super::load::Load;
use super::{Told, balance, errors, kernels, load, roofline};
use crate::failure::one_line;
use crate::report::units::{bytes, plural, seconds};

const STYLE: &str = include_str!("page.css");

/// Hatches and crosses, which all pictures use.
const PATTERNS: &str = "\
<svg class=\"patterns\" aria-hidden=\"true\"><defs>
<pattern id=\"hatch\" width=\"5\" height=\"5\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
<rect class=\"paper\" width=\"5\" height=\"5\"/><line class=\"hatch\" x1=\"0\" y1=\"0\" x2=\"0\" y2=\"5\"/></pattern>
<pattern id=\"cross\" width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\">\
<rect class=\"alarm\" width=\"8\" height=\"8\"/><path class=\"cross\" d=\"M1 1L7 7M7 1L1 7\"/></pattern>
</defs></svg>
";

/// All of it.
pub(super) fn page(told: &Told) -> String {
    let check = told.check;
    let name = name(&check.checkpoint);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{0}: mixture-of-experts layers</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         {PATTERNS}<header>\n<h1>{0}</h1>\n<p class=\"{1}\">{2}</p>\n{3}</header>\n<main>\n",
        escape(&name),
        if check.ok { "right" } else { "wrong" },
        escape(&format!("{} {}", if check.ok { "✓" } else { "✗" }, one_line(&check.verdict))),
        facts(overview(told)),
    );
    let mut section = |title: &str, body: &str| {
        out += &format!("<section>\n<h2>{}</h2>\n{body}</section>\n", escape(title));
    };
    let problems = kernels::problems(check);
    if !problems.is_empty() {
        section("What is wrong", &problems);
    }
    let (loads, source) = loads(told);
    section("Load of the experts", &load::section(&loads, &source));
    section("Balance over ranks", &balance::section(told.plan));
    section("Errors", &errors::section(&check.layers));
    section("Speed against the machine's limits", &roofline::section(check, told.bench));
    section("Kernels", &kernels::section(told.explain));
    section("Findings of the doctor", &kernels::findings(check));
    section("All layers", &layers(told, &loads));
    out + &format!(
        "</main>\n<footer>moe-runner {}</footer>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// A checkpoint's own name, without the folders before it.
fn name(path: &str) -> String {
    let last = std::path::Path::new(path).file_name();
    one_line(&last.map_or(path.into(), |name| name.to_string_lossy()))
}

fn overview<'a>(told: &Told) -> Vec<(&'a str, String)> {
    let check = told.check;
    let mut shapes: Vec<String> = check
        .layers
        .iter()
        .map(|layer| format!("{}, top-{}", plural(layer.experts, "expert"), layer.top_k))
        .collect();
    shapes.dedup();
    let mut dtypes: Vec<&str> =
        check.layers.iter().map(|layer| layer.dtype).filter(|dtype| !dtype.is_empty()).collect();
    dtypes.sort_unstable();
    dtypes.dedup();
    let mut inputs: Vec<String> = check
        .layers
        .iter()
        .filter(|layer| !layer.inputs.is_empty())
        .map(|layer| format!("{}, {}", plural(layer.tokens, "token"), layer.inputs))
        .collect();
    inputs.dedup();
    let total = check.layers.iter().map(|layer| layer.bytes_weights).sum();
    let mut facts = vec![
        ("checkpoint", format!("{} ({})", one_line(&check.checkpoint), check.architecture)),
        ("MoE layers", format!("{}: {}; {}", check.layers.len(), shapes.join("; "), bytes(total))),
    ];
    facts.extend(told.formulas.first().map(|formulas| ("a layer", formulas.clone())));
    facts
        .push(("checked on", format!("{} ({} activations)", inputs.join("; "), dtypes.join(", "))));
    if let Some(machine) = &check.machine {
        facts.push(("machine", machine.to_string()));
    }
    facts
}

/// The load of each layer: the trace's, else of the tokens that it was checked with.
fn loads<'a>(told: &Told<'a>) -> (Vec<Load<'a>>, String) {
    if told.plan.load_from == "trace" {
        let layers = told.plan.layers.iter();
        let loads = layers.map(|layer| Load { layer: layer.layer, slots: &layer.load }).collect();
        return (
            loads,
            format!("From the trace, {} a layer at most.", plural(told.plan.tokens, "token")),
        );
    }
    let layers = told.check.layers.iter();
    let loads = layers.map(|layer| Load { layer: layer.layer, slots: &layer.load }).collect();
    let first = told.check.layers.first();
    let source = first.map_or(String::new(), |layer| {
        format!(
            "From the {} that the layers were checked with, whose hidden states are {}; a recorded routing \
             (--trace) tells more.",
            plural(layer.tokens, "token"),
            one_line(&layer.inputs)
        )
    });
    (loads, source)
}

/// All layers as numbers.
fn layers(told: &Told, loads: &[Load]) -> String {
    let titles = [
        ">layer",
        "",
        "kernel",
        "routing",
        ">NMSE",
        ">bound",
        ">busiest",
        ">never chosen",
        ">balance",
        ">balanced",
        ">1 token",
        ">of the limit",
    ];
    let none = || "-".to_owned();
    let rows = told.check.layers.iter().map(|layer| {
        let load = loads.iter().find(|load| load.layer == layer.layer);
        let load = load.filter(|load| !load.slots.is_empty());
        let plan = told.plan.layers.iter().find(|plan| plan.layer == layer.layer);
        let one = layer.speed.iter().find(|speed| speed.tokens == 1);
        let error = |value: Option<f64>| value.map_or(none(), |value| format!("{value:.1e}"));
        [
            layer.layer.to_string(),
            if layer.ok { "✓" } else { "✗ FAIL" }.to_owned(),
            layer.kernel.unwrap_or("-").to_owned(),
            match layer.ids_equal {
                Some(true) => "same experts".to_owned(),
                Some(false) => "OTHER EXPERTS".to_owned(),
                None => none(),
            },
            error(layer.nmse),
            error(layer.bound),
            load.map_or(none(), |load| format!("{:.2} × mean", load.busiest().1)),
            load.map_or(none(), |load| load.idle().to_string()),
            plan.map_or(none(), |plan| format!("{:.3}", plan.balance_before)),
            plan.map_or(none(), |plan| format!("{:.3}", plan.balance_after)),
            one.map_or(none(), |speed| seconds(speed.median_s)),
            one.map_or(none(), |speed| format!("{:.0} %", 100.0 * speed.limit_share)),
        ]
    });
    table(&titles, rows)
}
