//! Checkpoints that load, and are not what anybody meant: each is found for what it is, and nothing is
//! found in those that are well.

#![allow(missing_docs)]

#[path = "../cases/mod.rs"]
mod cases;
mod model;

use moe_kernels::pool::{Inline, Pool};
use moe_runner::checkpoint::architecture;
use moe_runner::doctor::{self, Finding, FindingKind, Severity};
use moe_runner::weights::LoadedLayer;

use model::{CORRECTION, DOWN, EXPERTS, GATE, GATE_OF_SHARED, HIDDEN, Model, ROUTER, UP, expert};

/// All findings of a model's one layer, and of its file.
fn examine(model: &Model) -> Vec<Finding> {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model.open(folder.path());
    let entry = &architecture::layers(&checkpoint).unwrap()[0];
    let layer = LoadedLayer::load(&checkpoint, entry).unwrap();
    let found = doctor::examine(&checkpoint, entry, &layer, &Inline);
    let pool = Pool::new(3).unwrap();
    assert_eq!(found, doctor::examine(&checkpoint, entry, &layer, &pool), "on three threads");
    found.into_iter().chain(doctor::files(&checkpoint)).collect()
}

/// The one finding.
fn only(model: &Model) -> Finding {
    let mut found = examine(model);
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

/// The one finding, which is of this kind, severity, experts and first tensor.
fn expect(
    model: &Model,
    kind: FindingKind,
    severity: Severity,
    experts: &[usize],
    name: &str,
) -> String {
    let found = only(model);
    assert_eq!((found.kind, found.severity), (kind, severity), "{found}");
    assert_eq!(found.experts, experts, "{found}");
    assert_eq!(found.names[0], name, "{found}");
    let text = found.to_string();
    assert!(text.contains("model.safetensors") && text.contains(name), "{text}");
    text
}

#[test]
fn a_sound_checkpoint_has_no_findings() {
    assert_eq!(examine(&Model::new()), []);
}

/// Neither in what was recorded from real and random models, nor in the small trained one where it
/// stands beside the repository.
#[test]
fn nothing_is_found_in_the_recorded_checkpoints() {
    let pool = Pool::new(2).unwrap();
    for case in cases::all_cases() {
        assert_eq!(doctor::files(&case.checkpoint), [], "{}", case.name);
        for (entry, layer) in case.layers() {
            let found = doctor::examine(&case.checkpoint, &entry, &layer, &pool);
            assert_eq!(found, [], "{} layer {}", case.name, entry.spec.index);
        }
    }
    // a trained one
    let trained = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-moe");
    let checkpoint = moe_runner::checkpoint::Checkpoint::open(&trained).unwrap();
    assert_eq!(doctor::files(&checkpoint), []);
    for entry in architecture::layers(&checkpoint).unwrap() {
        let layer = LoadedLayer::load(&checkpoint, &entry).unwrap();
        let found = doctor::examine(&checkpoint, &entry, &layer, &pool);
        assert_eq!(found, [], "layer {}", entry.spec.index);
    }
}

#[test]
fn experts_of_zeros() {
    let mut model = Model::new();
    for name in [GATE, UP, DOWN] {
        model.fill(&expert(3, name), 0.0);
    }
    let gate = expert(3, GATE);
    let text = expect(&model, FindingKind::ZeroWeights, Severity::Error, &[3], &gate);
    assert!(text.contains("gate projection of expert 3") && text.contains("2 more"), "{text}");
    // one projection is enough
    let mut model = Model::new();
    model.fill(&expert(5, DOWN), 0.0);
    expect(&model, FindingKind::ZeroWeights, Severity::Error, &[5], &expert(5, DOWN));
}

#[test]
fn gates_of_zeros() {
    let mut model = Model::new();
    model.fill(ROUTER, 0.0);
    expect(&model, FindingKind::ZeroGate, Severity::Error, &[], ROUTER);
    let mut model = Model::new();
    model.rows(ROUTER, 2..3, |_| 0.0);
    expect(&model, FindingKind::ZeroGate, Severity::Warning, &[2], ROUTER);
    let mut model = Model::with_a_gate_of_the_shared_expert();
    assert_eq!(examine(&model), []);
    model.fill(GATE_OF_SHARED, 0.0);
    expect(&model, FindingKind::ZeroGate, Severity::Error, &[], GATE_OF_SHARED);
}

#[test]
fn a_hole_in_a_tensor() {
    let mut model = Model::new();
    model.rows(&expert(1, UP), 8..16, |_| 0.0);
    let up = expert(1, UP);
    let text = expect(&model, FindingKind::ZeroRows, Severity::Warning, &[1], &up);
    assert!(text.contains("8 rows of zeros among 32, the first is row 8"), "{text}");
    // an eighth is too many to be padding, less is not
    model.rows(&up, 12..16, |_| 0.01);
    expect(&model, FindingKind::ZeroRows, Severity::Warning, &[1], &up);
    model.rows(&up, 11..12, |_| 0.01);
    assert_eq!(examine(&model), []);
}

#[test]
fn copies_of_experts() {
    let mut model = Model::new();
    for name in [GATE, UP, DOWN] {
        model.copy(&expert(1, name), &expert(6, name));
    }
    let gate = expert(1, GATE);
    let text = expect(&model, FindingKind::Copies, Severity::Warning, &[1, 6], &gate);
    assert!(text.contains("experts 1 and 6, and so are all of their weights"), "{text}");
    // of one projection
    let mut model = Model::new();
    model.copy(&expert(0, DOWN), &expert(7, DOWN));
    let down = expert(0, DOWN);
    let text = expect(&model, FindingKind::Copies, Severity::Warning, &[0, 7], &down);
    assert!(text.contains("down projection"), "{text}");
    // of gate as up
    let mut model = Model::new();
    model.copy(&expert(4, GATE), &expert(4, UP));
    let gate = expert(4, GATE);
    let text = expect(&model, FindingKind::Copies, Severity::Warning, &[4], &gate);
    assert!(text.contains("gate and up of expert 4"), "{text}");
}

/// The same in the dense branch, which is no routed expert's.
#[test]
fn copies_in_the_shared_expert() {
    let shared = |name: &str| format!("model.layers.0.mlp.shared_experts.{name}.weight");
    let mut model = Model::new();
    model.copy(&shared(GATE), &shared(UP));
    expect(&model, FindingKind::Copies, Severity::Warning, &[], &shared(GATE));
    // how large its weights are is not the routed experts' to say
    let mut model = Model::new();
    model.map(&shared(UP), |value| value * 1000.0);
    assert_eq!(examine(&model), []);
}

/// A single weight that differs, in whatever column, makes another expert.
#[test]
fn a_weight_of_difference_is_no_copy() {
    for column in 0..HIDDEN {
        let mut model = Model::new();
        for name in [GATE, UP, DOWN] {
            model.copy(&expert(1, name), &expert(6, name));
            model.values(&expert(6, name))[column] *= 1.5;
        }
        assert_eq!(examine(&model), [], "column {column}");
    }
}

/// Two rows that trade places make another matrix.
#[test]
fn permutations_are_no_copies() {
    let mut model = Model::new();
    for name in [GATE, UP, DOWN] {
        model.copy(&expert(1, name), &expert(6, name));
        let width = if name == DOWN { 32 } else { HIDDEN };
        let values = model.values(&expert(6, name));
        let (first, second) = values.split_at_mut(width);
        first.swap_with_slice(&mut second[..width]);
    }
    assert_eq!(examine(&model), []);
}

/// Nobody reads a number of forty digits.
#[test]
fn ratios_are_short() {
    let mut model = Model::new();
    model.map(&expert(2, UP), |value| value * 1e30);
    let up = expert(2, UP);
    let text = expect(&model, FindingKind::OffScale, Severity::Warning, &[2], &up);
    assert!(text.contains("is 1e30 times as large"), "{text}");
}

#[test]
fn scales_far_off_their_neighbours() {
    for (times, words) in [(1000.0, "times as large"), (1e-3, "times smaller")] {
        let mut model = Model::new();
        model.map(&expert(2, UP), |value| value * times);
        let up = expert(2, UP);
        let text = expect(&model, FindingKind::OffScale, Severity::Warning, &[2], &up);
        assert!(text.contains(words), "{text}");
    }
    let mut model = Model::new();
    model.rows(&expert(2, UP), 9..10, |value| value * 300.0);
    let text = expect(&model, FindingKind::OffScale, Severity::Warning, &[2], &expert(2, UP));
    assert!(text.contains("the first is row 9"), "{text}");
    let mut model = Model::new();
    model.rows(ROUTER, 4..5, |value| value * 300.0);
    expect(&model, FindingKind::OffScale, Severity::Warning, &[4], ROUTER);
    // of two experts the large one is called out
    let mut model = Model::sized(2, 1);
    model.map(&expert(1, UP), |value| value * 1000.0);
    expect(&model, FindingKind::OffScale, Severity::Warning, &[1], &expert(1, UP));
}

/// What is zero or no number says nothing of how large the rest is, and is told for what it is alone.
#[test]
fn zeros_and_numbers_that_are_none_are_told_once() {
    let up = expert(1, UP);
    let mut model = Model::new();
    model.rows(&up, 4..28, |_| 0.0);
    expect(&model, FindingKind::ZeroRows, Severity::Warning, &[1], &up);
    let mut model = Model::new();
    model.fill(&up, f32::NAN);
    expect(&model, FindingKind::NonFinite, Severity::Error, &[1], &up);
}

#[test]
fn routers_that_do_not_route() {
    // all rows the same: ties go to the first experts
    let mut model = Model::new();
    model.fill(CORRECTION, 0.0);
    let row = model.values(ROUTER)[..HIDDEN].to_vec();
    model.values(ROUTER).chunks_mut(HIDDEN).for_each(|other| other.copy_from_slice(&row));
    let text = expect(&model, FindingKind::CollapsedRouting, Severity::Error, &[0, 1], ROUTER);
    assert!(text.contains("the same 2 of 8 experts"), "{text}");
    // a correction that no score outweighs
    let mut model = Model::new();
    model.values(CORRECTION)[3] = 5.0;
    model.values(CORRECTION)[5] = 5.0;
    expect(&model, FindingKind::CollapsedRouting, Severity::Error, &[3, 5], ROUTER);
    // one that only scores of small rows do not outweigh: hardly meant, and may be
    model.values(CORRECTION)[3] = 0.9;
    model.values(CORRECTION)[5] = 0.9;
    expect(&model, FindingKind::CollapsedRouting, Severity::Warning, &[3, 5], ROUTER);
    // where every token takes every expert, nothing has collapsed
    assert_eq!(examine(&Model::sized(EXPERTS, EXPERTS)), []);
}

#[test]
fn weights_that_are_no_numbers() {
    let mut model = Model::new();
    let up = expert(1, UP);
    model.values(&up)[2 * HIDDEN + 5] = f32::NAN;
    model.values(&up)[7 * HIDDEN] = f32::INFINITY;
    let text = expect(&model, FindingKind::NonFinite, Severity::Error, &[1], &up);
    assert!(text.contains("NaN at row 2, column 5"), "{text}");
    let mut model = Model::new();
    model.values(ROUTER)[HIDDEN + 3] = f32::INFINITY;
    let text = expect(&model, FindingKind::NonFinite, Severity::Error, &[], ROUTER);
    assert!(text.contains("inf at row 1, column 3"), "{text}");
    let mut model = Model::new();
    model.values(CORRECTION)[6] = f32::NAN;
    assert!(only(&model).to_string().contains("NaN at 6"));
}

/// A file that was made in its full size, and filled in part.
#[test]
fn tails_of_zeros() {
    let whole = Model::new().bytes();
    let found = |zeros: usize| {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = whole.clone();
        let end = bytes.len();
        bytes[end - zeros..].fill(0);
        let checkpoint = Model::new().open_bytes(folder.path(), &bytes);
        doctor::files(&checkpoint)
    };
    assert_eq!(found(0), []);
    // the last tensor of the file is the shared expert's up projection, 32 rows of 64 numbers
    let last = "model.layers.0.mlp.shared_experts.up_proj.weight";
    let before = "model.layers.0.mlp.shared_experts.gate_proj.weight";
    for (zeros, severity, names) in [
        (1000, Severity::Error, vec![last]),
        (4 * 256, Severity::Warning, vec![last]),
        (20 * 256, Severity::Error, vec![last]),
        (32 * 256, Severity::Error, vec![last]),
        (32 * 256 + 4, Severity::Error, vec![last, before]),
        (whole.len() / 2, Severity::Error, vec![last, before]),
    ] {
        let found = found(zeros);
        assert_eq!(found.len(), 1, "{zeros}: {found:?}");
        let first = &found[0];
        assert_eq!((first.kind, first.severity), (FindingKind::ZeroTail, severity), "{zeros}");
        assert_eq!(first.names[..names.len()], names, "{zeros}");
        // what does not end in zeros is not named
        assert!(first.names.len() == names.len() || zeros == whole.len() / 2, "{zeros}: {first:?}");
        assert_eq!(first.layer, None);
        assert!(first.to_string().contains("model.safetensors"), "{first}");
    }
}

/// Vectors of zeros are nothing out of the ordinary, wherever they stand.
#[test]
fn biases_of_zeros_are_no_tail() {
    let mut model = Model::new();
    model.add("z.bias", &[64], |_| 0.0);
    model.add("z.running_mean", &[64], |_| 0.0);
    assert_eq!(examine(&model), []);
}

/// All numbers of the checkpoint are zero: what there is to say of it is said once for each kind.
#[test]
fn a_checkpoint_of_zeros() {
    let mut model = Model::new();
    model.zero();
    let found = examine(&model);
    let kinds: Vec<FindingKind> = found.iter().map(|finding| finding.kind).collect();
    let zeros = [FindingKind::ZeroWeights, FindingKind::ZeroGate, FindingKind::ZeroTail];
    assert_eq!(kinds, zeros, "{found:#?}");
    assert!(found.iter().all(|finding| finding.severity == Severity::Error));
    assert_eq!(found[0].experts, (0..EXPERTS).collect::<Vec<_>>());
}
