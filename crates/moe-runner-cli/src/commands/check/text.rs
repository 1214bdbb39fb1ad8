//! What `check` prints for people.

use std::time::Duration;

use moe_runner::experts::KERNELS;

use super::super::acid;
use super::CheckJson;
use super::layer::{LOGITS_BOUND, LayerCheck, Speed};
use crate::failure::one_line;
use crate::report::bars::bars;
use crate::report::table::{Facts, Tone, toned};
use crate::report::units::{self, plural};
use crate::report::width::width;
use crate::splitting;

/// Up to so many layers are shown in full as they are done; more have a line each.
const IN_FULL: usize = 4;

/// A layer of fewer bytes stays in the caches of any machine between two runs.
const CACHED: usize = 1 << 20;

/// How many problems of a layer are shown.
const SHOWN: usize = 5;

/// Layers as they are done.
pub(super) struct Live {
    /// Few layers are shown in full.
    in_full: bool,
    /// There is another checkpoint beside this one.
    another: bool,
    /// Titles and widths of the cells of a layer, in as many lines as they take.
    lines: Vec<Vec<(&'static str, usize)>>,
}

/// Before the second line of a layer: as wide as its number.
const INDENT: &str = "       ";

impl Live {
    /// For so many layers, which `another` checkpoint stands beside.
    pub(super) fn new(layers: usize, another: bool) -> Self {
        let kernels = KERNELS.iter().map(|kernel| kernel.name.len()).max().unwrap_or(0);
        let mut columns = vec![
            (">layer", 5),
            ("", 4),
            ("kernel", kernels),
            (">NMSE", 7),
            (">bound", 7),
            ("routing", 7),
            (">1 token", 8),
            (">limit", 6),
            (">load", 10),
            ("", 14),
        ];
        if another {
            columns.insert(columns.len() - 1, (">of the other", 12));
        }
        let limit = width().unwrap_or(usize::MAX);
        let (mut lines, mut line, mut used) = (Vec::new(), Vec::new(), 0);
        for column in columns {
            if used + column.1 > limit {
                lines.push(std::mem::take(&mut line));
                used = INDENT.len();
            }
            used += column.1 + 2;
            line.push(column);
        }
        lines.push(line);
        Self { in_full: layers <= IN_FULL, another, lines }
    }

    /// What comes before the first layer.
    pub(super) fn opening(&self, json: &CheckJson) -> String {
        let mut facts = Facts::new();
        facts.add("checkpoint", format!("{} ({})", one_line(&json.checkpoint), json.architecture));
        if let Some(sizes) = &json.split {
            facts.add("split", splitting::describe(sizes));
        }
        if let Some(machine) = &json.machine {
            facts.add("machine", machine.to_string());
        }
        match self.in_full {
            true => facts.to_string(),
            false => {
                let titles = self.lines.iter().flatten();
                let titles = titles.map(|(title, _)| title.trim_start_matches('>'));
                format!("{facts}\n{}", self.line(titles.map(str::to_owned)))
            }
        }
    }

    /// A layer that is done, and how long the others will take.
    pub(super) fn layer(&self, layer: &LayerCheck, left: Option<Duration>) -> String {
        if self.in_full {
            return full(layer);
        }
        let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1e}"));
        let one = layer.speed.iter().find(|speed| speed.tokens == 1).or(layer.speed.first());
        let most = layer.load.iter().max().copied().unwrap_or(0);
        let mean = layer.load.iter().sum::<usize>() as f64 / layer.load.len().max(1) as f64;
        let left = left.filter(|left| left.as_secs() > 0);
        let of_the_other = self.another.then(|| number(layer.original_nmse));
        let cells = [
            layer.layer.to_string(),
            if layer.ok { "pass".into() } else { "FAIL".into() },
            layer.kernel.unwrap_or("-").to_owned(),
            number(layer.nmse),
            number(layer.bound),
            match layer.ids_equal {
                Some(true) => "same".into(),
                Some(false) => "OTHER".into(),
                None => "-".into(),
            },
            one.map_or("-".into(), |speed| units::seconds(speed.median_s)),
            one.map_or("-".into(), |speed| format!("{:.0} %", 100.0 * speed.limit_share)),
            format!("{:.1}× mean", most as f64 / mean.max(1e-9)),
        ];
        let left = left.map(|left| format!("{} left", units::seconds(left.as_secs_f64())));
        let line = self.line(cells.into_iter().chain(of_the_other).chain(left));
        match layer.ok {
            true => {
                layer.asides().fold(line, |line, aside| format!("{line}\n{INDENT}{}", aside.line()))
            }
            false => format!("{line}\n{}", full(layer)),
        }
    }

    fn line(&self, cells: impl IntoIterator<Item = String>) -> String {
        let mut cells = cells.into_iter();
        let lines = self.lines.iter().enumerate().map(|(i, columns)| {
            let cells = columns.iter().zip(&mut cells).map(|((title, width), cell)| {
                match title.starts_with('>') {
                    true => format!("{cell:>width$}"),
                    false => format!("{cell:width$}"),
                }
            });
            let indent = if i == 0 { "" } else { INDENT };
            let line = indent.to_owned() + &cells.collect::<Vec<_>>().join("  ");
            line.trim_end().to_owned()
        });
        let lines: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
        lines.join("\n")
    }
}

/// What comes after the last layer.
pub(super) fn closing(json: &CheckJson) -> String {
    let tone = if json.ok { Tone::Good } else { Tone::Bad };
    let findings: String = json.findings.iter().map(|finding| finding.line() + "\n").collect();
    findings + &toned(tone, &json.verdict) + &acid(json) + &outlook(&json.layers)
}

/// That the acid test found nothing, where it was run.
fn acid(json: &CheckJson) -> String {
    match &json.acid {
        Some(lines) if lines.iter().all(|line| line.ok) => {
            format!("\nThe acid test finds all {} architectures right.", lines.len())
        }
        _ => String::new(),
    }
}

/// What the acid test found, in one sentence.
pub(super) fn failed_acid<'a>(lines: impl Iterator<Item = &'a acid::Line>) -> String {
    let wrong = lines.filter(|line| !line.ok);
    let wrong: Vec<String> =
        wrong.map(|line| format!("{}: {}", line.family, line.faults.join("; "))).collect();
    format!("WRONG: the acid test finds {}", wrong.join(", "))
}

/// What is known when the run is interrupted, in one sentence.
pub(super) fn interrupted(layers: &[LayerCheck], left: usize) -> String {
    let all = layers.len() + left;
    match layers {
        [] => format!("INTERRUPTED: none of {} was checked", plural(all, "MoE layer")),
        _ => format!(
            "INTERRUPTED: {} of {} were checked. {}",
            layers.len(),
            plural(all, "MoE layer"),
            verdict(layers, &[])
        ),
    }
}

/// The whole in one sentence; `unsound`: what is wrong with files.
pub(super) fn verdict(layers: &[LayerCheck], unsound: &[&str]) -> String {
    let wrong: Vec<&LayerCheck> = layers.iter().filter(|layer| !layer.ok).collect();
    if let Some(first) = wrong.first() {
        let problem = first.problems.first().map_or("not checked", String::as_str);
        return format!(
            "WRONG: {} of {}; first, layer {}: {}",
            wrong.len(),
            plural(layers.len(), "MoE layer"),
            first.layer,
            one_line(problem)
        );
    }
    if let Some(first) = unsound.first() {
        return format!("WRONG: {first}");
    }
    let recorded: usize = layers.iter().map(|layer| layer.recorded.len()).sum();
    let recorded = match recorded {
        0 => String::new(),
        count => {
            format!(", and the {}", plural(count, "recorded output"))
        }
    };
    let worst = layers.iter().flat_map(compared).max_by(|a, b| a.share().total_cmp(&b.share()));
    let worst = worst.map_or(String::new(), |Compared { what, layer, nmse, bound }| {
        format!(" (worst: {what} of layer {layer}, NMSE {nmse:.1e}, bound {bound:.0e})")
    });
    format!(
        "RIGHT: {} computed what the float64 reference does{recorded}{worst}{}",
        match layers.len() {
            1 => "the MoE layer".to_owned(),
            count => format!("all {count} MoE layers"),
        },
        match layers.iter().flat_map(LayerCheck::asides).filter(|aside| aside.counts(true)).count()
        {
            0 => String::new(),
            count => format!("; {}", plural(count, "warning")),
        }
    )
}

/// One comparison of a layer.
struct Compared<'a> {
    what: &'a str,
    layer: usize,
    nmse: f64,
    bound: f64,
}

impl Compared<'_> {
    fn share(&self) -> f64 {
        self.nmse / self.bound
    }
}

/// All comparisons of a layer that have a bound.
fn compared(check: &LayerCheck) -> impl Iterator<Item = Compared<'_>> {
    let output = check.nmse.zip(check.bound).map(|(nmse, bound)| ("the output", nmse, bound));
    let logits = check.router_logits_nmse.map(|nmse| ("the router logits", nmse, LOGITS_BOUND));
    let recorded = check.recorded.iter().map(|r| (r.name.as_str(), r.nmse, r.bound));
    let all = output.into_iter().chain(logits).chain(recorded);
    all.map(|(what, nmse, bound)| Compared { what, layer: check.layer, nmse, bound })
}

/// What the times of single tokens add up to.
fn outlook(layers: &[LayerCheck]) -> String {
    let single: Option<Vec<f64>> = layers
        .iter()
        .map(|layer| layer.speed.iter().find(|speed| speed.tokens == 1).map(|s| s.median_s))
        .collect();
    match single {
        Some(times) if !times.is_empty() => {
            let sum: f64 = times.iter().sum();
            format!(
                "\nThe checked layers take {} for one token: at most {:.0} tokens/s from them alone.",
                units::seconds(sum),
                1.0 / sum
            )
        }
        _ => String::new(),
    }
}

fn full(layer: &LayerCheck) -> String {
    let status = match layer.ok {
        true => toned(Tone::Good, "pass"),
        false => toned(Tone::Bad, "FAIL"),
    };
    let title = toned(Tone::Title, &format!("layer {}  {}", layer.layer, one_line(&layer.name)));
    let mut facts = Facts::new();
    for problem in layer.problems.iter().take(SHOWN) {
        facts.add("problem", one_line(problem));
    }
    if layer.problems.len() > SHOWN {
        facts.add("", format!("{} more (--json lists all)", layer.problems.len() - SHOWN));
    }
    for aside in layer.asides() {
        facts.add("doctor", aside.line());
    }
    if !layer.unexpected.is_empty() {
        facts.add("unexpected", one_line(&layer.unexpected.join(", ")));
    }
    if let Some(kernel) = layer.kernel {
        facts.add(
            "weights",
            format!(
                "{}, all present and finite, {}",
                plural(layer.experts, "expert"),
                units::bytes(layer.bytes_weights)
            ),
        );
        facts.add("kernel", format!("{kernel} ({}), {} activations", layer.why, layer.dtype));
    }
    if !layer.inputs.is_empty() {
        facts.add("inputs", format!("{}, {}", plural(layer.tokens, "token"), layer.inputs));
    }
    if let (Some(nmse), Some(bound)) = (layer.nmse, layer.bound) {
        let mut line = format!("NMSE {nmse:.1e} of the reference, bound {bound:.0e}");
        if let (Some(token), Some(expert)) = (layer.worst_token, layer.worst_expert) {
            line += &format!(
                "; worst token {}: {:.1e}, worst expert {}: {:.1e}",
                token.index, token.nmse, expert.index, expert.nmse
            );
        }
        facts.add("output", line);
    }
    if let Some(equal) = layer.ids_equal {
        let ids = if equal { "same experts" } else { "OTHER EXPERTS" };
        let weights = layer.weights_max_difference.unwrap_or(0.0);
        let logits =
            layer.router_logits_nmse.map_or(String::new(), |e| format!(", logits NMSE {e:.0e}"));
        facts.add(
            "routing",
            format!(
                "{ids} for {}, {}{logits}",
                plural(layer.tokens, "token"),
                match weights {
                    0.0 => "same weights".to_owned(),
                    _ => format!("weights within {weights:.0e}"),
                }
            ),
        );
    }
    if !layer.recorded.is_empty() {
        let each = layer.recorded.iter().map(|recorded| {
            let mark = if recorded.ok { "" } else { " FAIL" };
            format!("{} NMSE {:.1e}{mark}", recorded.name, recorded.nmse)
        });
        facts.add("recorded", each.collect::<Vec<_>>().join(", "));
    }
    if let Some(nmse) = layer.original_nmse {
        let worst = layer.original_worst_expert.map_or(String::new(), |worst| {
            format!("; worst expert {}: {:.1e}", worst.index, worst.nmse)
        });
        let random = match layer.inputs.as_str() {
            "random" => {
                "\non random hidden states, which overstate what quantisation loses 1.5 to 3 \
                         times; --input or a recording has real ones"
            }
            _ => "",
        };
        let line = format!("NMSE {nmse:.1e} of the other checkpoint's layer{worst}{random}");
        facts.add("original", line);
    }
    let cached = layer.bytes_weights < CACHED;
    let speeds: Vec<String> = layer.speed.iter().map(|s| speed_line(s, cached)).collect();
    facts.add("speed", speeds.join("\n"));
    if !layer.load.is_empty() {
        let mut lines = bars(&layer.load);
        if let Some(last) = lines.last_mut() {
            let (least, most) = (layer.load.iter().min(), layer.load.iter().max());
            *last +=
                &format!("  {} to {} tokens an expert", least.unwrap_or(&0), most.unwrap_or(&0));
        }
        facts.add("load", lines.join("\n"));
    }
    format!("{title}  {status}\n{facts}\n")
}

fn speed_line(speed: &Speed, cached: bool) -> String {
    format!(
        "{:>9}  {:>8}  {:6.2} GB/s  {:7.2} GFLOP/s  {:>4.0} % of the limit{}",
        plural(speed.tokens, "token"),
        units::seconds(speed.median_s),
        speed.gbps,
        speed.gflops,
        100.0 * speed.limit_share,
        if cached || speed.limit_share > 1.0 { " (weights in cache)" } else { "" },
    ) + &speed.bytes_moved_per_token.map_or(String::new(), |bytes| {
        format!("  {} moved a token", units::bytes(bytes.round() as usize))
    })
}
