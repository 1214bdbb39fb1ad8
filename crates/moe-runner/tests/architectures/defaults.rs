//! What `config.json` leaves out: for every family, what its recorded configuration class says.

use std::collections::BTreeMap;

use moe_runner::checkpoint::architecture;
use moe_runner::spec::Activation;
use serde_json::{Value, json};

use crate::synthetic::Model;

/// The recorded classes. `scripts/families/record.py` makes them from the library.
fn classes() -> BTreeMap<String, Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/checkpoint/architecture/classes.json");
    let text = std::fs::read_to_string(path).unwrap();
    let mut document: Value = serde_json::from_str(&text).unwrap();
    assert!(document["library"].as_str().unwrap().starts_with("transformers 5."));
    serde_json::from_value(document["classes"].take()).unwrap()
}

fn class<'a>(classes: &'a BTreeMap<String, Value>, name: &str) -> &'a Value {
    let entry = &classes[name];
    entry["as"].as_str().map_or(entry, |same| &classes[same])
}

/// The first of `keys` that has a value.
fn first<'a>(values: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().map(|key| &values[*key]).find(|value| !value.is_null())
}

const EXPERTS: &[&str] =
    &["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"];
const TOP_K: &[&str] =
    &["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"];
const SCALES: &[&str] = &[
    "routed_scaling_factor",
    "route_scale",
    "router_scaling_factor",
    "moe_router_scaling_factor",
    "moe_routed_scaling_factor",
];

/// Layers of a config that says nothing but `more`.
fn layers(
    model_type: &str,
    more: &[(&str, Value)],
) -> Result<Vec<architecture::LayerEntry>, String> {
    let mut model = Model { config: json!({ "model_type": model_type }), ..Model::default() };
    for (key, value) in more {
        model.config[*key] = value.clone();
    }
    model.add("model.embed_tokens.weight", &[2, 2]);
    let folder = tempfile::tempdir().unwrap();
    architecture::layers(&model.open(folder.path())).map_err(|error| error.to_string())
}

/// A config with its model type alone is a model of the class's own sizes.
#[test]
fn a_config_that_says_nothing_is_the_class() {
    let classes = classes();
    let mut compared = 0;
    for model_type in architecture::known() {
        if !classes.contains_key(model_type) {
            continue;
        }
        let values = &class(&classes, model_type)["values"];
        let layers = match layers(model_type, &[]) {
            Ok(layers) => layers,
            // no class has a value for these: the key is named
            Err(error) => {
                assert!(
                    error.contains("is missing") || error.contains("enable_moe_block"),
                    "{model_type}: {error}"
                );
                continue;
            }
        };
        let Some(entry) = layers.last() else { continue };
        let spec = &entry.spec;
        let size = |keys: &[&str]| first(values, keys).and_then(Value::as_u64);
        if let Some(experts) = size(EXPERTS) {
            assert_eq!(spec.router.experts as u64, experts, "{model_type}");
        }
        if let Some(top_k) = size(TOP_K) {
            assert_eq!(spec.router.top_k as u64, top_k, "{model_type}");
        }
        if let Some(hidden) = size(&["hidden_size", "d_model"]) {
            assert_eq!(spec.dims.hidden as u64, hidden, "{model_type}");
        }
        if let Some(scale) = first(values, SCALES).and_then(Value::as_f64) {
            assert_eq!(spec.routed_scale.factor, scale as f32, "{model_type}");
        }
        let groups = size(&["n_group", "num_expert_group"]).zip(size(&["topk_group"]));
        if let (Some(groups), Some((count, keep))) = (spec.router.groups, groups) {
            assert_eq!((groups.count as u64, groups.keep as u64), (count, keep), "{model_type}");
        }
        compared += 1;
    }
    assert!(compared > 50, "{compared}");
}

/// Field by field, for every class: what is left out, is `null`, or is spelled otherwise makes the
/// layers that the class's own value makes.
#[test]
fn every_field_that_is_absent_or_null_or_spelled_otherwise() {
    let classes = classes();
    let (mut absent, mut nulls, mut spellings) = (0, 0, 0);
    for model_type in architecture::known().filter(|name| classes.contains_key(*name)) {
        let class = class(&classes, model_type);
        let values = class["values"].as_object().unwrap();
        let of = |values: &serde_json::Map<String, Value>| {
            let more: Vec<(&str, Value)> =
                values.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
            layers(model_type, &more)
        };
        // some need a key for which no class has a value
        let Ok(whole) = of(values) else { continue };
        let aliases = class["aliases"].as_object().cloned().unwrap_or_default();
        for (key, value) in values {
            let mut config = values.clone();
            config.remove(key);
            assert_eq!(of(&config).as_ref(), Ok(&whole), "{model_type} without {key}");
            absent += 1;
            // the same under another name must not stand beside it
            config.retain(|other, _| aliases.get(other).is_none_or(|stands_for| stands_for != key));
            if let Some(stands_for) = aliases.get(key) {
                config.remove(stands_for.as_str().unwrap());
            }
            if let Some(becomes) = class["null"].get(key) {
                config.insert(key.clone(), becomes.clone());
                let wanted = of(&config);
                config.insert(key.clone(), Value::Null);
                assert_eq!(of(&config), wanted, "{model_type} with null for {key}");
                nulls += 1;
            }
            for (alias, _) in aliases.iter().filter(|(_, stands_for)| *stands_for == key) {
                config.remove(key);
                // other than the class's own value, so that it makes a difference
                let other = match value.as_u64() {
                    Some(number) => json!(number + number % 2 + 2),
                    None => continue,
                };
                let mut under = config.clone();
                under.insert(key.clone(), other.clone());
                config.insert(alias.clone(), other);
                assert_eq!(of(&config), of(&under), "{model_type}: {alias} for {key}");
                spellings += 1;
            }
        }
    }
    assert!(absent > 900 && nulls > 10 && spellings > 60, "{absent} {nulls} {spellings}");
}

/// What `scripts/families/compare.py --fields` found when it was last run beside the library: each
/// family's block computes what the library computes, and goes on to with each key left out or null.
#[test]
fn the_library_was_agreed_with_field_by_field() {
    let text = include_str!("compared.json");
    let document: Value = serde_json::from_str(text).unwrap();
    assert!(document["library"].as_str().unwrap().starts_with("transformers 5."));
    let families = document["families"].as_object().unwrap();
    for (family, found) in families {
        assert_eq!(found["different"], json!([]), "{family}");
        assert!(found["keys"].is_u64(), "{family}");
    }
    assert!(families.len() >= 70, "{}", families.len());
}

/// The values that were wrong once.
#[test]
fn groups_factors_and_dense_layers() {
    for model_type in ["deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "axk1", "beam"] {
        let layers = layers(model_type, &[]).unwrap();
        let groups = layers[0].spec.router.groups.unwrap();
        assert_eq!((groups.count, groups.keep), (8, 4), "{model_type}");
    }
    let bailing = &layers("bailing_hybrid", &[]).unwrap()[0].spec;
    assert_eq!((bailing.index, bailing.router.groups.unwrap().count), (2, 8));
    let lite = &layers("glm4_moe_lite", &[]).unwrap()[0].spec;
    assert_eq!(lite.routed_scale.factor, 1.8);
    let k = ("num_experts_per_tok", json!(4));
    assert_eq!(layers("unlimited_ocr_text", &[k]).unwrap()[0].spec.index, 1);
    let v4 = layers("deepseek_v4", &[]).unwrap();
    let hashed = |i: usize| {
        matches!(v4[i].spec.router.selection, moe_runner::spec::Selection::HashTable { .. })
    };
    assert_eq!([hashed(0), hashed(2), hashed(3)], [true, true, false]);
}

/// A `null` is what the class makes of it.
#[test]
fn nulls() {
    use moe_runner::spec::Renormalise;
    for (model_type, key) in [
        ("deepseek_v3", "norm_topk_prob"),
        ("mistral4", "norm_topk_prob"),
        ("kimi_linear", "moe_renormalize"),
        ("bailing_hybrid", "moe_renormalize"),
    ] {
        match layers(model_type, &[(key, Value::Null)]) {
            Ok(layers) => {
                assert_eq!(layers[0].spec.router.renormalise, Renormalise::None, "{model_type}");
            }
            Err(error) => assert!(error.contains(key), "{model_type}: {error}"),
        }
    }
    let mimo = layers("mimo_v2_flash", &[("routed_scaling_factor", Value::Null)]).unwrap();
    assert_eq!(mimo[0].spec.routed_scale.factor, 1.0);
    let qwen = layers("qwen3_moe", &[("mlp_only_layers", Value::Null)]).unwrap();
    assert_eq!(qwen.len(), layers("qwen3_moe", &[]).unwrap().len());
}

/// DeepSeek-V2 chooses among all experts, unless its method is the one that is limited to groups.
#[test]
fn methods_of_deepseek_v2() {
    let groups = |method: Option<&str>| {
        let mut keys = vec![
            ("num_experts_per_tok", json!(6)),
            ("n_group", json!(8)),
            ("topk_group", json!(3)),
        ];
        keys.extend(method.map(|method| ("topk_method", json!(method))));
        let groups = layers("deepseek_v2", &keys).unwrap()[0].spec.router.groups;
        groups.map(|groups| (groups.count, groups.keep))
    };
    assert_eq!(groups(Some("greedy")), None);
    assert_eq!(groups(None), None);
    assert_eq!(groups(Some("group_limited_greedy")), Some((8, 3)));
}

/// DBRX divides by the sum of the weights where it does not name another norm; `null` is none at all.
#[test]
fn norms_of_dbrx() {
    use moe_runner::spec::Renormalise;
    let norm = |p: Option<Value>| {
        let mut ffn = json!({"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64});
        ffn.as_object_mut().unwrap().extend(p.map(|p| ("moe_normalize_expert_weights".into(), p)));
        layers("dbrx", &[("ffn_config", ffn)]).unwrap()[0].spec.router.renormalise
    };
    assert_eq!(norm(None), Renormalise::PNorm { p: 1.0 });
    assert_eq!(norm(Some(json!(2.0))), Renormalise::PNorm { p: 2.0 });
    assert_eq!(norm(Some(Value::Null)), Renormalise::None);
}

/// Kimi's activation has a bound for the gate, and one for the up projection where that is bounded.
#[test]
fn bounds_of_kimi() {
    let bounds = |linear: Option<Value>| {
        let mut keys = vec![("hidden_act", json!("situ")), ("activation_situ_beta", json!(4.0))];
        keys.extend(linear.map(|value| ("activation_situ_linear_beta", value)));
        match layers("kimi_k3", &keys).unwrap()[0].spec.expert.activation {
            Activation::Situ { beta, lambda } => (beta, lambda),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(bounds(Some(json!(25.0))), (4.0, Some(25.0)));
    assert_eq!(bounds(Some(Value::Null)), (4.0, None));
    assert_eq!(bounds(None), (4.0, None));
    let error = layers("kimi_k3", &[("hidden_act", json!("situ"))]).unwrap_err();
    assert!(error.contains("activation_situ_beta"), "{error}");
}

/// Inkling's experts have a width of their own, or the one beside that of dense layers.
#[test]
fn widths_of_inkling() {
    let width = |more: &[(&str, Value)]| layers("inkling_text", more).unwrap()[0].spec.dims;
    let whole = ("intermediate_size", json!(64));
    assert_eq!(width(std::slice::from_ref(&whole)).intermediate, 3072);
    let dense = ("dense_intermediate_size", json!(96));
    assert_eq!(width(&[whole, dense]).intermediate, 64);
}

/// Spellings that the classes accept.
#[test]
fn aliases() {
    for (model_type, key) in [
        ("qwen3_moe", "num_local_experts"),
        ("deepseek_v3", "num_local_experts"),
        ("unlimited_ocr_text", "num_experts"),
        ("sarvam_moe", "num_experts"),
        ("bailing_hybrid", "num_local_experts"),
    ] {
        let more = [(key, json!(64)), ("num_experts_per_tok", json!(4))];
        assert_eq!(layers(model_type, &more).unwrap()[0].spec.router.experts, 64, "{model_type}");
    }
    let scaled = layers("inkling2", &[("routed_scaling_factor", json!(3.5))]).unwrap();
    assert_eq!(scaled[0].spec.routed_scale.factor, 3.5);
}

/// A pattern that the config has counts, in whichever way it is written, not the class's own.
#[test]
fn patterns_of_layers() {
    for (key, value) in [
        ("layers_block_type", json!(["mamba", "moe", "attention", "moe"])),
        ("layer_types", json!(["linear_attention", "moe", "full_attention", "moe"])),
        ("hybrid_override_pattern", json!("ME*E")),
    ] {
        let layers =
            layers("nemotron_h", &[(key, value), ("num_hidden_layers", json!(4))]).unwrap();
        let indices: Vec<usize> = layers.iter().map(|entry| entry.spec.index).collect();
        assert_eq!(indices, [1, 3], "{key}");
    }
}

/// Where a class's `mlp_bias` makes the shared experts' biases, it does so here.
#[test]
fn biases_of_shared_experts() {
    for model_type in ["step3p5", "hy_v3"] {
        for bias in [false, true] {
            let layers = layers(model_type, &[("mlp_bias", json!(bias))]).unwrap();
            assert_eq!(layers[0].spec.shared.as_ref().unwrap().bias, bias, "{model_type}");
        }
    }
}
