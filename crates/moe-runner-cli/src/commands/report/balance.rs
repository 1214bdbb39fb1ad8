//! The load of ranks before and after experts are moved among them.

use super::super::plan::{LayerJson, PlanJson};
use super::html::{figure, paragraph};
use super::svg::{Anchor, Scale, Svg, WIDTH};
use crate::report::units::{bytes, plural};

const LEFT: f64 = 44.0;
const TOP: f64 = 40.0;
const WORDS: f64 = 250.0;

/// The section.
pub(super) fn section(plan: &PlanJson) -> String {
    let source = match plan.load_from {
        "trace" => format!("The load is the trace's, of {}.", plural(plan.tokens, "token")),
        _ => "There is no trace: the load is made up, as uneven as measured ones.".to_owned(),
    };
    let caption = format!(
        "Mean load of {} over the largest: at 1 no rank waits for another. Rings are experts in order, \
         dots the experts as moe-runner plan --ranks {} places them. {source}",
        plural(plan.ranks, "rank"),
        plan.ranks
    );
    paragraph(&summary(plan)) + &figure(&draw(&plan.layers), &caption)
}

fn summary(plan: &PlanJson) -> String {
    let least = |of: fn(&LayerJson) -> f64| plan.layers.iter().map(of).fold(1.0, f64::min);
    let moved: usize = plan.layers.iter().map(|layer| layer.moved_bytes).sum();
    let copies = plan.layers.iter().map(|layer| layer.redundant).max().unwrap_or(0);
    format!(
        "Over {}, the worst layer's balance goes from {:.3} to {:.3}, by moving {} of experts{}.",
        plural(plan.ranks, "rank"),
        least(|layer| layer.balance_before),
        least(|layer| layer.balance_after),
        bytes(moved),
        match copies {
            0 => ", without copies".to_owned(),
            1 => ", with 1 copy more in a layer".to_owned(),
            count => format!(", with {count} copies more in a layer"),
        }
    )
}

fn draw(layers: &[LayerJson]) -> String {
    let height = (560.0 / layers.len().max(1) as f64).clamp(7.0, 26.0);
    let bottom = TOP + height * layers.len() as f64;
    // words where there is room for them
    let few = layers.len() <= 40;
    let scale = Scale::linear((0.0, 1.0), (LEFT, WIDTH - if few { WORDS } else { 20.0 }));
    let mut svg = Svg::new();
    svg.text("axis", (LEFT - 8.0, TOP - 22.0), Anchor::End, "layer");
    svg.text("axis", (LEFT, TOP - 22.0), Anchor::Start, "mean load of a rank / largest load");
    for i in 0..=4 {
        let value = f64::from(i) / 4.0;
        svg.line("grid", (scale.at(value), TOP), (scale.at(value), bottom));
        svg.text("tick", (scale.at(value), TOP - 6.0), Anchor::Middle, &format!("{value}"));
    }
    let step = (13.0 / height).ceil() as usize;
    for (i, layer) in layers.iter().enumerate() {
        let y = TOP + height * (i as f64 + 0.5);
        if i % step == 0 {
            svg.text("tick", (LEFT - 8.0, y + 4.0), Anchor::End, &layer.layer.to_string());
        }
        let (before, after) = (layer.balance_before, layer.balance_after);
        let title = format!("layer {}: balance {before:.3} before, {after:.3} after", layer.layer);
        let radius = (height * 0.3).min(5.0);
        svg.line("link", (scale.at(before), y), (scale.at(after), y));
        svg.circle("ring", (scale.at(before), y), radius, &title);
        svg.circle("dot", (scale.at(after), y), radius, &title);
        if few {
            let words = format!("{before:.3} → {after:.3}, {} moved", bytes(layer.moved_bytes));
            svg.text("tick", (WIDTH, y + 4.0), Anchor::End, &words);
        }
    }
    svg.finish(bottom + 12.0, "Balance of every layer over the ranks, before and after")
}
