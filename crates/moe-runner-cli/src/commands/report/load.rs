//! How often each expert is chosen.

use super::heat::{Heat, Mark, Row, Tone};
use super::html::{figure, paragraph};
use crate::checkpoints::ranges;
use crate::report::units::plural;

/// Where tones change, in means of the layer.
const BOUNDS: [f64; 8] = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0];

/// What the tones mean.
const MEANINGS: [&str; 9] = [
    "under ¼ of the mean",
    "¼ to ½",
    "½ to ¾",
    "¾ to 1",
    "1 to 1½",
    "1½ to 2",
    "2 to 4",
    "4 to 8",
    "8 times the mean and more",
];

/// Of a layer: slots that went to each expert.
pub(super) struct Load<'a> {
    pub(super) layer: usize,
    pub(super) slots: &'a [usize],
}

impl Load<'_> {
    pub(super) fn mean(&self) -> f64 {
        self.slots.iter().sum::<usize>() as f64 / self.slots.len().max(1) as f64
    }

    /// The busiest expert, and its slots in means.
    pub(super) fn busiest(&self) -> (usize, f64) {
        let most =
            self.slots.iter().enumerate().max_by_key(|(expert, n)| (**n, usize::MAX - expert));
        let (expert, slots) = most.unwrap_or((0, &0));
        (expert, self.share(*slots))
    }

    pub(super) fn idle(&self) -> usize {
        self.slots.iter().filter(|slots| **slots == 0).count()
    }

    /// In means of the layer.
    fn share(&self, slots: usize) -> f64 {
        slots as f64 / self.mean().max(f64::MIN_POSITIVE)
    }

    fn tone(&self, slots: usize) -> Tone {
        if slots == 0 {
            return Tone::Nothing;
        }
        let share = self.share(slots);
        Tone::Level(1 + BOUNDS.iter().filter(|bound| share >= **bound).count() as u8)
    }
}

/// The section; `source` tells whose choices these are.
pub(super) fn section(loads: &[Load], source: &str) -> String {
    if loads.iter().all(|load| load.slots.is_empty()) {
        return paragraph("No layer could be run, and there is no trace: the load is not known.");
    }
    let most = loads.iter().map(|load| load.busiest().1).fold(1.0, f64::max);
    let end = most.max(2.0);
    let rows: Vec<Row> = loads
        .iter()
        .map(|load| {
            let (expert, share) = load.busiest();
            Row {
                layer: load.layer,
                tones: load.slots.iter().map(|slots| load.tone(*slots)).collect(),
                marks: vec![Mark::Bar(share / end), Mark::Limit(1.0 / end)],
                words: format!("{share:.2}"),
                title: format!(
                    "layer {}: busiest is expert {expert} with {share:.2} times the mean; {} of {} \
                     never chosen",
                    load.layer,
                    load.idle(),
                    plural(load.slots.len(), "expert")
                ),
            }
        })
        .collect();
    let rows = few_words(rows);
    let mut seen: Vec<Tone> = rows.iter().flat_map(|row| row.tones.iter().copied()).collect();
    seen.sort_unstable();
    seen.dedup();
    let meaning = |tone: Tone| match tone {
        Tone::Level(level) => MEANINGS[usize::from(level) - 1].to_owned(),
        _ => "never chosen".to_owned(),
    };
    let heat = Heat {
        label: "Load of the experts: layers by experts",
        rows,
        strip: ("busiest expert, in means", ticks(end)),
        legend: seen.into_iter().map(|tone| (tone, meaning(tone))).collect(),
        cell: &|row, expert| {
            let load = &loads[row];
            let (slots, share) = (load.slots[expert], load.share(load.slots[expert]));
            (
                format!("{share:.2}"),
                format!(
                    "layer {}, expert {expert}: {}, {share:.2} times the mean",
                    load.layer,
                    plural(slots, "slot")
                ),
            )
        },
    };
    let caption = format!(
        "A cell is an expert of a layer, the stronger the more often it is chosen, against the mean of its \
         layer; hatched ones are never chosen. The bars beside it are the busiest experts: a batch waits \
         for them. {source}"
    );
    paragraph(&summary(loads)) + &figure(&heat.draw(), &caption)
}

/// What the picture shows, in words.
fn summary(loads: &[Load]) -> String {
    let uneven = loads.iter().max_by(|a, b| a.busiest().1.total_cmp(&b.busiest().1));
    let Some(uneven) = uneven else { return String::new() };
    let (expert, share) = uneven.busiest();
    let mut text = format!(
        "Layer {} is the most uneven: its expert {expert} has {share:.2} times the mean.",
        uneven.layer
    );
    let idle: usize = loads.iter().map(Load::idle).sum();
    let layers: Vec<usize> =
        loads.iter().filter(|load| load.idle() > 0).map(|load| load.layer).collect();
    text += &match idle {
        0 => " Every expert of every layer is chosen.".to_owned(),
        _ => format!(
            " {} never chosen, in {} {}.",
            match idle {
                1 => "1 expert is".to_owned(),
                _ => format!("{idle} experts are"),
            },
            if layers.len() == 1 { "layer" } else { "layers" },
            ranges(&layers)
        ),
    };
    text
}

/// Words only where rows have room for them.
pub(super) fn few_words(mut rows: Vec<Row>) -> Vec<Row> {
    if rows.len() > 40 {
        rows.iter_mut().for_each(|row| row.words.clear());
    }
    rows
}

/// 0, and round numbers of means up to `end`.
fn ticks(end: f64) -> Vec<(f64, String)> {
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|step| end / step <= 4.0);
    let step = step.unwrap_or(100.0);
    let count = (end / step) as usize;
    (0..=count).map(|i| i as f64 * step).map(|v| (v / end, format!("{v:.0}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tones_follow_the_mean() {
        let load = Load { layer: 0, slots: &[0, 1, 9, 10, 80, 20] };
        assert_eq!(load.mean(), 20.0);
        let tones: Vec<Tone> = load.slots.iter().map(|slots| load.tone(*slots)).collect();
        let level = Tone::Level;
        assert!(tones == [Tone::Nothing, level(1), level(2), level(3), level(8), level(5)]);
        assert_eq!((load.busiest(), load.idle()), ((4, 4.0), 1));
        assert_eq!(
            summary(&[load]),
            "Layer 0 is the most uneven: its expert 4 has 4.00 times the mean. 1 expert is never chosen, in layer 0."
        );
    }
}
