//! How far each layer, and each expert, is from the float64 reference; and from the checkpoint that
//! this one was quantised from.

use super::super::check::{LayerCheck, Worst};
use super::heat::{Heat, LEVELS, Mark, Row, Tone};
use super::html::{escape, figure, paragraph};
use super::load::few_words;
use super::svg::Scale;

/// A layer's errors, all as NMSE.
struct Errors<'a> {
    layer: usize,
    /// Of the whole output.
    total: f64,
    bound: Option<f64>,
    ok: bool,
    /// The expert that has the largest part in them.
    worst: Option<Worst>,
    experts: &'a [Option<f64>],
}

/// The section.
pub(super) fn section(layers: &[LayerCheck]) -> String {
    let reference: Vec<Errors> = layers
        .iter()
        .filter_map(|check| {
            Some(Errors {
                layer: check.layer,
                total: check.nmse?,
                bound: check.bound,
                ok: check.ok,
                worst: check.worst_expert,
                experts: &check.expert_nmse,
            })
        })
        .collect();
    if reference.is_empty() {
        return paragraph("No layer could be run: there is nothing to compare.");
    }
    let mut out = paragraph(&summary(&reference));
    out += &chart(
        &reference,
        "Errors against the float64 reference: layers by experts",
        "NMSE = |y − r|²/|r|² of the kernel's output against the float64 reference, on the same hidden \
         states. A cell is what an expert has in the errors of its tokens, the stronger the larger, in \
         powers of ten; hatched ones had no tokens. In the strip, a dot is the layer, a ring its worst \
         expert, the line the bound that the layer has to keep.",
    );
    let original: Vec<Errors> = layers
        .iter()
        .filter_map(|check| {
            Some(Errors {
                layer: check.layer,
                total: check.original_nmse?,
                bound: None,
                ok: true,
                worst: check.original_worst_expert,
                experts: &check.original_expert_nmse,
            })
        })
        .collect();
    if !original.is_empty() {
        out += &format!("<h3>{}</h3>\n", escape("Against the other checkpoint"));
        out += &chart(
            &original,
            "Errors against the other checkpoint: layers by experts",
            "How far this checkpoint's outputs are from those of the one it is compared with: what \
             quantisation lost. Nobody can say how much that may be; experts and layers that lost far \
             more than others are worth a finer format.",
        );
    }
    out
}

fn summary(all: &[Errors]) -> String {
    let share = |errors: &&Errors| errors.total / errors.bound.unwrap_or(f64::INFINITY);
    let Some(worst) = all.iter().max_by(|a, b| share(a).total_cmp(&share(b))) else {
        return String::new();
    };
    let bound = worst.bound.map_or(String::new(), |bound| format!(", its bound {bound:.0e}"));
    let expert = match worst.worst {
        Some(Worst { index: expert, nmse }) => {
            format!("; most of it comes from expert {expert}, {nmse:.1e} of its tokens' outputs")
        }
        None => String::new(),
    };
    format!(
        "Nearest to its bound is layer {}: NMSE {:.1e}{bound}{expert}.",
        worst.layer, worst.total
    )
}

/// Powers of ten that the tones have to tell apart.
const DECADES: f64 = 4.0;

/// Steps of tones, in powers of ten.
struct Decades {
    /// The logarithm of where the first begins.
    from: f64,
    step: f64,
}

impl Decades {
    /// The finest that have room for all values but those that are next to nothing beside the others.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let usable = values.filter(|v| v.is_finite() && *v > 0.0).map(f64::log10);
        let (least, most) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), v| {
            (least.min(v), most.max(v))
        });
        if least > most {
            return Self { from: 0.0, step: 1.0 };
        }
        let least = least.max(most - DECADES);
        let fits = |step: &f64| {
            let from = (least / step).floor() * step;
            most < from + step * f64::from(LEVELS)
        };
        let step = [0.25, 0.5].into_iter().find(fits).unwrap_or(1.0);
        Self { from: (least / step).floor() * step, step }
    }

    fn tone(&self, value: f64) -> Tone {
        match value {
            v if !v.is_finite() => Tone::Over,
            v if v <= 0.0 => Tone::Level(1),
            v => {
                let level = ((v.log10() - self.from) / self.step).floor() + 1.0;
                Tone::Level(level.clamp(1.0, LEVELS.into()) as u8)
            }
        }
    }

    fn meaning(&self, tone: Tone) -> String {
        match tone {
            Tone::Nothing => "no tokens".into(),
            Tone::Over => "not right".into(),
            Tone::Level(1) => format!("under {:.1e}", 10f64.powf(self.from + self.step)),
            Tone::Level(level) => {
                let edge = |level: u8| 10f64.powf(self.from + self.step * f64::from(level));
                format!("{:.1e} to {:.1e}", edge(level - 1), edge(level))
            }
        }
    }
}

fn chart(all: &[Errors], label: &str, caption: &str) -> String {
    let decades =
        Decades::of(all.iter().flat_map(|errors| errors.experts.iter().flatten().copied()));
    let tone = |errors: &Errors, nmse: Option<f64>| match (nmse, errors.bound) {
        (None, _) => Tone::Nothing,
        (Some(nmse), Some(bound)) if !errors.ok && nmse > bound => Tone::Over,
        (Some(nmse), _) => decades.tone(nmse),
    };
    let (scale, ticks) = axis(all);
    let rows: Vec<Row> = all
        .iter()
        .map(|errors| {
            let worst = errors.worst;
            let mut marks: Vec<Mark> =
                errors.bound.map(|bound| Mark::Limit(scale.at(bound))).into_iter().collect();
            marks.extend(worst.map(|worst| Mark::Ring(scale.at(worst.nmse))));
            marks.push(Mark::Dot(scale.at(errors.total)));
            let of = worst.map_or(String::new(), |worst| {
                format!(", worst expert {}: {:.1e}", worst.index, worst.nmse)
            });
            let bound = errors.bound.map_or(String::new(), |bound| format!(", bound {bound:.0e}"));
            Row {
                layer: errors.layer,
                tones: errors.experts.iter().map(|nmse| tone(errors, *nmse)).collect(),
                marks,
                words: format!("{:.1e}", errors.total),
                title: format!("layer {}: NMSE {:.1e}{bound}{of}", errors.layer, errors.total),
            }
        })
        .collect();
    let rows = few_words(rows);
    let mut seen: Vec<Tone> = rows.iter().flat_map(|row| row.tones.iter().copied()).collect();
    seen.sort_unstable();
    seen.dedup();
    let heat = Heat {
        label,
        rows,
        strip: ("NMSE of the layer", ticks),
        legend: seen.into_iter().map(|tone| (tone, decades.meaning(tone))).collect(),
        cell: &|row, expert| {
            let errors = &all[row];
            let text = match errors.experts[expert] {
                Some(nmse) => format!("{nmse:.1e}"),
                None => String::new(),
            };
            let told = match errors.experts[expert] {
                Some(nmse) => format!("NMSE {nmse:.1e}"),
                None => "no tokens".into(),
            };
            (text, format!("layer {}, expert {expert}: {told}", errors.layer))
        },
    };
    figure(&heat.draw(), caption)
}

/// The strip's axis: whole powers of ten around all that is shown.
fn axis(all: &[Errors]) -> (Scale, Vec<(f64, String)>) {
    let worst = |errors: &Errors| errors.worst.map(|worst| worst.nmse);
    let shown = all.iter().flat_map(|e| [Some(e.total), e.bound, worst(e)]).flatten();
    let shown = shown.filter(|v| v.is_finite() && *v > 0.0).map(f64::log10);
    let (least, most) =
        shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, m), v| (l.min(v), m.max(v)));
    let (least, most) = match least <= most {
        true => ((least - 0.05).floor(), (most + 0.05).ceil()),
        false => (-1.0, 0.0),
    };
    let scale = Scale::log((10f64.powf(least), 10f64.powf(most)), (0.0, 1.0));
    let step = ((most - least) / 3.0).ceil().max(1.0);
    let ticks = (0..).map(|i| least + step * f64::from(i)).take_while(|power| *power <= most);
    let ticks = ticks.map(|power| (scale.at(10f64.powf(power)), format!("1e{power:.0}")));
    (scale, ticks.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tones_have_the_finest_steps_with_room_for_all() {
        let decades = Decades::of([1e-7, 4e-7, 0.0, f64::NAN].into_iter());
        assert!((decades.from - -7.0).abs() < 1e-9 && decades.step == 0.25);
        assert!(decades.tone(1.1e-7) == Tone::Level(1) && decades.tone(4e-7) == Tone::Level(3));
        assert!(decades.tone(0.0) == Tone::Level(1) && decades.tone(f64::NAN) == Tone::Over);
        assert_eq!(decades.meaning(Tone::Level(1)), "under 1.8e-7");
        assert_eq!(decades.meaning(Tone::Level(2)), "1.8e-7 to 3.2e-7");
        let wide = Decades::of([1e-14, 2e-2].into_iter());
        assert_eq!(wide.step, 0.5);
        assert!(wide.tone(2e-2) == Tone::Level(9) && wide.tone(1e-14) == Tone::Level(1));
        let none = Decades::of([].into_iter());
        assert_eq!(none.step, 1.0);
    }

    #[test]
    fn experts_are_blamed_only_where_the_layer_is_wrong() {
        let experts = [Some(3e-5), None];
        let of = |ok| Errors {
            layer: 4,
            total: 1e-6,
            bound: Some(1e-5),
            ok,
            worst: None,
            experts: &experts,
        };
        assert!(!chart(&[of(true)], "", "").contains("over"));
        let wrong = chart(&[of(false)], "", "");
        assert!(wrong.contains("c over") && wrong.contains("not right"), "{wrong}");
        assert!(wrong.contains("layer 4, expert 1: no tokens"));
    }
}
