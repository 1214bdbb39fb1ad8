//! Every mistake that a checkpoint can show is named from log-probabilities alone, and a right block
//! raises no alarm.

use std::collections::BTreeSet;

use half::bf16;
use moe_acid::{Block, Decoder, FAMILIES, Mistake, Note, Question, Readings};

/// What a model's head makes of a block's parts: log-probabilities with a constant and a scale of
/// each row's own, in bfloat16 where the engine's head is.
fn log_probabilities(
    block: &Block,
    mistakes: &[Mistake],
    multipliers: (f64, f64),
    sixteen: bool,
) -> Vec<Vec<f64>> {
    let [routed, shared] = block.simulate(&mistakes.iter().copied().collect());
    let round = |v: f64| if sixteen { bf16::from_f64(v).to_f64() } else { v };
    let row = |probe: usize| {
        let (scale, constant) = (0.3 + 0.05 * probe as f64, -7.0 - probe as f64);
        let parts = routed[probe].iter().zip(&shared[probe]);
        let reads = parts.map(|(r, s)| 4.0 * (multipliers.0 * r + multipliers.1 * s));
        let logits = [0.0, 5.0].into_iter().chain(reads).map(|v| round(v * scale));
        let probes = std::iter::repeat_n(-30.0, block.probes.len());
        probes.chain(logits).map(|v| v + constant).collect()
    };
    (0..block.probes.len()).map(row).collect()
}

fn readings(block: &Block, mistakes: &[Mistake], multipliers: (f64, f64), bf16: bool) -> Readings {
    let rows = log_probabilities(block, mistakes, multipliers, bf16);
    Readings::from_log_probabilities(block, &rows).unwrap()
}

#[test]
fn a_right_block_is_right_in_32_and_16_bits() {
    for family in FAMILIES {
        let block = Block::new(family);
        let decoder = Decoder::new(&block);
        for bf16 in [false, true] {
            let verdict = decoder.verdict(&readings(&block, &[], (1.0, 1.0), bf16));
            assert!(verdict.is_right(), "{} {bf16}: {verdict}", family.name);
            assert!(verdict.mistakes.is_empty() && verdict.residual < 0.01);
            assert_eq!(verdict.notes, [Note::TiesLowest], "{}", family.name);
        }
    }
}

/// Rows of 8 bits are a note; a mistake beside them is named as without.
#[test]
fn rows_that_are_rounded_to_eight_bits_are_a_note() {
    for family in FAMILIES {
        let block = Block::new(family);
        let decoder = Decoder::new(&block);
        for mistake in [None, Some(Mistake::GateUpSwapped)] {
            let all: Vec<Mistake> = mistake.into_iter().chain([Mistake::RowsInEightBits]).collect();
            let verdict = decoder.verdict(&readings(&block, &all, (1.0, 1.0), false));
            assert_eq!(verdict.mistakes, Vec::from_iter(mistake), "{}: {verdict}", family.name);
            assert!(verdict.notes.contains(&Note::RowsRounded), "{}", family.name);
        }
    }
}

#[test]
fn every_mistake_is_named_or_its_class_is_known() {
    for family in FAMILIES {
        let block = Block::new(family);
        let decoder = Decoder::new(&block);
        for mistake in Mistake::of(family) {
            let class = decoder.class_of(mistake);
            assert!(!class.contains(&None), "{}: '{mistake}' does not show", family.name);
            for bf16 in [false, true] {
                let verdict = decoder.verdict(&readings(&block, &[mistake], (1.0, 1.0), bf16));
                let named = match *verdict.mistakes {
                    [one] => one == mistake || class.contains(&Some(one)),
                    _ => false,
                };
                assert!(named, "{} {bf16}: '{mistake}' is called '{verdict}'", family.name);
                assert!(!verdict.is_right());
                assert!(verdict.residual < 0.01, "{}: {mistake}", family.name);
            }
        }
    }
}

#[test]
fn classes_are_few_and_known() {
    let mut classes = BTreeSet::new();
    for family in FAMILIES {
        let block = Block::new(family);
        let decoder = Decoder::new(&block);
        for mistake in Mistake::of(family) {
            for other in decoder.class_of(mistake).into_iter().flatten() {
                let mut pair = [mistake, other];
                pair.sort();
                classes.insert((family.name, pair));
            }
        }
    }
    assert_eq!(classes, BTreeSet::new());
}

#[test]
fn multipliers_of_both_parts_are_told() {
    for (name, multipliers, words) in [
        ("deepseek_v3", (0.4, 1.0), "scaling factor never applied (x0.400)"),
        ("deepseek_v3", (2.5, 1.0), "scaling factor applied twice (x2.500)"),
        ("deepseek_v3", (1.0, 0.0), "shared expert missing"),
        ("deepseek_v3", (1.0, 2.5), "shared expert scaled too (x2.500)"),
        ("deepseek_v3", (1.0, 8.0), "shared expert multiplied (x8.000)"),
        ("qwen2_moe", (1.0, 3.718), "shared gate ignored (x3.718)"),
        ("qwen2_moe", (1.0, -3.718), "shared gate without its sigmoid (x-3.718)"),
        ("mixtral", (0.0, 1.0), "routed output multiplied (x0.000)"),
        ("llama4", (2.0, 1.0), "routed output multiplied (x2.000)"),
        ("mixtral", (4.0, 1.0), "gate's tensor scale is used for up (x4.000)"),
        ("gpt_oss", (0.5, 1.0), "routed output multiplied (x0.500)"),
        // beyond what 16 bits do
        ("mixtral", (1.05, 1.0), "routed output multiplied (x1.050)"),
        ("llama4", (1.0, 0.95), "shared expert multiplied (x0.950)"),
    ] {
        let block = Block::new(moe_acid::Family::named(name).unwrap());
        let verdict = Decoder::new(&block).verdict(&readings(&block, &[], multipliers, false));
        assert!(verdict.to_string().contains(words), "{name} {multipliers:?}: {verdict}");
        assert!(verdict.mistakes.is_empty(), "{name} {multipliers:?}: {verdict}");
    }
}

#[test]
fn two_mistakes_at_once_are_both_named() {
    for (name, pair) in [
        ("deepseek_v3", [Mistake::GroupsIgnored, Mistake::GateUpSwapped]),
        ("deepseek_v3", [Mistake::BiasInWeights, Mistake::WeightOnInput]),
        ("gpt_oss", [Mistake::ClampMissing, Mistake::DownBiasUnweighted]),
        ("gpt_oss", [Mistake::SoftmaxOverAll, Mistake::PlusOneMissing]),
        ("mixtral", [Mistake::NotRenormalised, Mistake::GeluForSilu]),
        ("ernie4_5_moe", [Mistake::BiasIgnored, Mistake::ExpertsShifted]),
    ] {
        let block = Block::new(moe_acid::Family::named(name).unwrap());
        let verdict = Decoder::new(&block).verdict(&readings(&block, &pair, (1.0, 1.0), true));
        let named: BTreeSet<Mistake> = verdict.mistakes.iter().copied().collect();
        assert_eq!(named, BTreeSet::from(pair), "{name}: {verdict}");
    }
}

#[test]
fn what_nobody_knows_is_called_unknown() {
    let block = Block::new(&FAMILIES[0]);
    let mut seen = readings(&block, &[], (1.0, 1.0), false);
    // a little, and much
    for more in [0.1, 1.0] {
        for (at, value) in seen.0.iter_mut().flatten().enumerate() {
            *value += more * if at % 3 == 0 { 0.7 } else { -0.3 };
        }
        let verdict = Decoder::new(&block).verdict(&seen);
        assert!(verdict.to_string().starts_with("unknown mistake"), "{verdict}");
    }
    seen.0[0][0] = f64::NAN;
    let verdict = Decoder::new(&block).verdict(&seen);
    assert!(verdict.to_string().contains("not finite"), "{verdict}");
}

#[test]
fn readings_of_another_size_are_refused() {
    for family in FAMILIES {
        let block = Block::new(family);
        let rows = log_probabilities(&block, &[], (1.0, 1.0), false);
        let read = |rows: &[Vec<f64>]| Readings::from_log_probabilities(&block, rows);
        assert!(read(&rows[1..]).is_err(), "{}: a probe less", family.name);
        let mut short = rows.clone();
        short.last_mut().unwrap().pop();
        assert!(read(&short).is_err(), "{}: a token less", family.name);
        let output = vec![0.0; block.embeddings().concat().len()];
        assert!(Readings::from_output(&block, &output).is_ok());
        for len in [output.len() - 1, output.len() + family.hidden] {
            let other = vec![0.0; len];
            assert!(Readings::from_output(&block, &other).is_err(), "{}: {len}", family.name);
        }
    }
}

#[test]
fn rounding_and_ties_are_notes() {
    let block = Block::new(&FAMILIES[0]);
    let mut seen = readings(&block, &[], (1.0, 1.0), false);
    for choice in &block.probes.choices {
        seen.0[choice.probe].swap(choice.better, choice.other);
    }
    let verdict = Decoder::new(&block).verdict(&seen);
    assert!(verdict.is_right(), "{verdict}");
    assert_eq!(verdict.notes, [Note::TiesHighest, Note::LogitsRounded, Note::BiasRounded]);
}

/// A fault explains what it decides: where biases are ignored none was rounded, whichever way ties go.
#[test]
fn what_a_fault_explains_is_no_note() {
    for family in FAMILIES.iter().filter(|family| family.correction.is_some()) {
        let block = Block::new(family);
        let decoder = Decoder::new(&block);
        for highest in [false, true] {
            let mut seen = readings(&block, &[Mistake::BiasIgnored], (1.0, 1.0), false);
            for choice in &block.probes.choices {
                let chosen = |expert: usize| seen.0[choice.probe][expert].abs() > 0.01;
                let (low, high) =
                    (choice.better.min(choice.other), choice.better.max(choice.other));
                if highest && choice.question != Question::Logits && chosen(low) {
                    seen.0[choice.probe].swap(low, high);
                }
            }
            let verdict = decoder.verdict(&seen);
            assert_eq!(verdict.mistakes, [Mistake::BiasIgnored], "{}: {verdict}", family.name);
            let ties = if highest { Note::TiesHighest } else { Note::TiesLowest };
            assert_eq!(verdict.notes, [ties], "{}", family.name);
        }
    }
}
