//! What `check` prints for people.

use super::CheckJson;
use super::layer::{LayerCheck, Speed};
use crate::failure::one_line;
use crate::report::bars::bars;
use crate::report::table::{Columns, Facts, Tone, toned};
use crate::report::units::{self, plural};
use crate::splitting;

/// Up to so many layers are shown in full.
const IN_FULL: usize = 4;

/// A layer of fewer bytes stays in the caches of any machine between two runs.
const CACHED: usize = 1 << 20;

/// How many problems of a layer are shown.
const SHOWN: usize = 5;

pub(super) fn text(json: &CheckJson) -> String {
    let mut facts = Facts::new();
    facts.add("checkpoint", format!("{} ({})", one_line(&json.checkpoint), json.architecture));
    if let Some(sizes) = &json.split {
        facts.add("split", splitting::describe(sizes));
    }
    if let Some(machine) = &json.machine {
        facts.add("machine", machine.to_string());
    }
    let mut out = format!("{facts}\n");
    if json.layers.len() <= IN_FULL {
        json.layers.iter().for_each(|layer| out += &full(layer));
    } else {
        out += &format!("{}\n", table(&json.layers));
        json.layers.iter().filter(|layer| !layer.ok).for_each(|layer| out += &full(layer));
    }
    let tone = if json.ok { Tone::Good } else { Tone::Bad };
    out += &toned(tone, &json.verdict);
    out + &outlook(&json.layers)
}

/// The whole in one sentence.
pub(super) fn verdict(layers: &[LayerCheck]) -> String {
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
    let worst = layers.iter().filter_map(|layer| Some((layer.nmse?, layer.bound?)));
    let worst = worst.max_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let (nmse, bound) = worst.unwrap_or((0.0, 0.0));
    let recorded: usize = layers.iter().map(|layer| layer.recorded.len()).sum();
    let recorded = match recorded {
        0 => String::new(),
        count => {
            format!(", and the {}", plural(count, "recorded output"))
        }
    };
    format!(
        "RIGHT: {} computed what the float64 reference does{recorded} (worst NMSE {nmse:.1e}, \
         bound {bound:.0e})",
        match layers.len() {
            1 => "the MoE layer".to_owned(),
            count => format!("all {count} MoE layers"),
        }
    )
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
    if !layer.unexpected.is_empty() {
        facts.add("unexpected", one_line(&layer.unexpected.join(", ")));
    }
    if let Some(kernel) = layer.kernel {
        facts.add(
            "weights",
            format!(
                "{}, all present and finite, {}",
                plural(layer.experts, "expert"),
                units::bytes(layer.bytes)
            ),
        );
        facts.add("kernel", format!("{kernel} ({}), {} activations", layer.why, layer.dtype));
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
        facts.add("original", format!("NMSE {nmse:.1e} of the other checkpoint's layer"));
    }
    let cached = layer.bytes < CACHED;
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

fn table(layers: &[LayerCheck]) -> String {
    let mut titles = vec![
        ">layer", "", "kernel", ">NMSE", ">bound", "routing", ">1 token", ">GB/s", ">limit",
        ">load",
    ];
    let against = layers.iter().any(|layer| layer.original_nmse.is_some());
    titles.extend(against.then_some(">of the other"));
    let mut table = Columns::new(&titles);
    for layer in layers {
        let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1e}"));
        let one = layer.speed.iter().find(|speed| speed.tokens == 1).or(layer.speed.first());
        let most = layer.load.iter().max().copied().unwrap_or(0);
        let mean = layer.load.iter().sum::<usize>() as f64 / layer.load.len().max(1) as f64;
        let mut row = vec![
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
            one.map_or("-".into(), |speed| format!("{:.1}", speed.gbps)),
            one.map_or("-".into(), |speed| format!("{:.0} %", 100.0 * speed.limit_share)),
            format!("{:.1}× mean", most as f64 / mean.max(1e-9)),
        ];
        row.extend(against.then(|| number(layer.original_nmse)));
        table.row(row);
    }
    table.to_string()
}
