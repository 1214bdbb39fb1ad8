//! Everything that can be wrong with a layer's tensors is said by name.

use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::weights::{Accounting, LoadedLayer, account};

use crate::synthetic::{Model, merged};

const GATE: &str = "model.layers.0.mlp.gate.weight";
const UP: &str = "model.layers.0.mlp.experts.1.up_proj.weight";

fn model() -> Model {
    let config = merged(
        r#"{"model_type": "qwen2_moe", "hidden_size": 8, "num_hidden_layers": 1}"#,
        r#"{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
            "shared_expert_intermediate_size": 6}"#,
    );
    let mut model = Model { config, ..Model::default() };
    model.add(GATE, &[4, 8]);
    model.add("model.layers.0.mlp.shared_expert_gate.weight", &[1, 8]);
    for (expert, width) in
        (0..4).map(|e| (format!("experts.{e}"), 4)).chain([("shared_expert".into(), 6)])
    {
        let name = |projection| format!("model.layers.0.mlp.{expert}.{projection}.weight");
        model.add(&name("gate_proj"), &[width, 8]);
        model.add(&name("up_proj"), &[width, 8]);
        model.add(&name("down_proj"), &[8, width]);
    }
    // neighbours that are none of the layer's business
    model.add("model.layers.0.mlps.0.up_proj.weight", &[2, 2]);
    model.add("model.layers.0.self_attn.q_proj.weight", &[2, 2]);
    model
}

/// The account after `change`, and the error of loading.
fn after(change: impl FnOnce(&mut Model)) -> (Accounting, Option<String>) {
    let mut model = model();
    change(&mut model);
    let folder = tempfile::tempdir().unwrap();
    inspect(&model.open(folder.path()))
}

fn inspect(checkpoint: &Checkpoint) -> (Accounting, Option<String>) {
    let layers = architecture::layers(checkpoint).unwrap();
    let error = LoadedLayer::load(checkpoint, &layers[0]).err().map(|error| error.to_string());
    (account(checkpoint, &layers[0]), error)
}

#[test]
fn a_complete_layer() {
    let (account, error) = after(|_| {});
    assert_eq!(error, None);
    assert!(account.is_complete() && account.unexpected.is_empty(), "{account:?}");
    let floats = 4 * 8 + 8 + 4 * 3 * 4 * 8 + 3 * 6 * 8;
    assert_eq!(account.bytes, 4 * floats);
}

#[test]
fn missing() {
    let (account, error) = after(|model| {
        model.tensors.remove(UP);
        model.tensors.remove(GATE);
    });
    assert_eq!(account.missing, [GATE, UP]);
    let error = error.unwrap();
    assert!(
        error.contains(GATE) && error.contains("missing") && error.contains("1 more"),
        "{error}"
    );
}

#[test]
fn wrong_shape() {
    let (account, error) = after(|model| model.add(UP, &[8, 4]));
    assert_eq!(account.wrong.len(), 1);
    let error = error.unwrap();
    for part in [UP, "[8, 4]", "[4, 8]", "model.safetensors"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_vector_of_the_wrong_length() {
    let name = "model.layers.0.mlp.shared_expert_gate.weight";
    let (account, error) = after(|model| model.add(name, &[2, 4]));
    assert_eq!(account.wrong.len(), 1);
    assert!(error.unwrap().contains(name));
}

#[test]
fn wrong_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let mut rest = model();
    rest.tensors.remove(UP);
    rest.write(folder.path(), "model-00001-of-00002.safetensors");
    let bytes = vec![0u8; 4 * 8 * 8];
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![4, 8], &bytes).unwrap();
    let file = folder.path().join("model-00002-of-00002.safetensors");
    std::fs::write(file, safetensors::serialize([(UP, view)], None).unwrap()).unwrap();
    let (account, error) = inspect(&Checkpoint::open(folder.path()).unwrap());
    assert_eq!(account.wrong.len(), 1, "{account:?}");
    let error = error.unwrap();
    assert!(error.contains(UP) && error.contains("I64") && error.contains("00002"), "{error}");
}

#[test]
fn unexpected() {
    // beside the experts: what the layer computes without it is not what was meant
    for name in ["model.layers.0.mlp.extra.weight", "model.layers.0.mlp.shared_expert.up_proj.bias"]
    {
        let (account, error) = after(|model| model.add(name, &[1]));
        assert_eq!(account.unexpected, [name]);
        assert!(!account.is_complete());
        assert!(error.unwrap().contains(name));
    }

    // among the experts: an expert too many, a second spelling, a tensor of an unknown scheme
    for name in [
        "model.layers.0.mlp.experts.4.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight_scale",
        "model.layers.0.mlp.experts.gate_up_proj",
    ] {
        let (account, error) = after(|model| model.add(name, &[1]));
        assert_eq!(account.unexpected_experts, [name]);
        assert!(error.unwrap().contains(name));
    }
}

#[test]
fn duplicate() {
    let folder = tempfile::tempdir().unwrap();
    model().write(folder.path(), "model-00001-of-00002.safetensors");
    let mut second = Model { config: model().config, ..Model::default() };
    second.add(UP, &[4, 8]);
    second.write(folder.path(), "model-00002-of-00002.safetensors");
    let (account, error) = inspect(&Checkpoint::open(folder.path()).unwrap());
    assert_eq!(account.duplicates.len(), 1, "{account:?}");
    assert_eq!(account.duplicates[0].0, UP);
    assert_eq!(account.duplicates[0].1.len(), 2);
    let error = error.unwrap();
    assert!(error.contains(UP) && error.contains("several files"), "{error}");
}

/// A method that cannot be read is an error for what is stored so, and for nothing else.
#[test]
fn experts_that_an_unknown_method_left_alone() {
    let unknown = |model: &mut Model| {
        model.config["quantization_config"] =
            serde_json::json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
    };
    let (accounting, error) = after(unknown);
    assert!(accounting.is_complete() && error.is_none(), "{accounting:?} {error:?}");
    let (accounting, error) = after(|model| {
        unknown(model);
        let up = model.tensors.remove(UP).unwrap();
        model.tensors.insert(UP.replace(".weight", ".weight_packed"), up);
    });
    let error = error.unwrap();
    assert!(!accounting.is_complete() && error.contains("is 'bitsandbytes'; supported"), "{error}");
}
