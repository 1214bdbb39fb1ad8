//! The same experts, stored in every layout, must load as the same matrices.

use moe_runner::checkpoint::architecture;
use moe_runner::weights::{Expert, LoadedLayer, Matrix};

use crate::synthetic::{Model, merged};

const H: usize = 6;
const E: usize = 3;

const BASE: &str = r#"{
    "hidden_size": 6, "num_hidden_layers": 1, "num_experts_per_tok": 2, "num_experts": 3,
    "num_local_experts": 3, "n_routed_experts": 3, "mlp_layer_types": ["sparse"],
    "n_shared_experts": null
}"#;

/// Experts by projection: `gate[e][row][col]`, `up` likewise, `down`; no two values are alike.
struct Experts {
    width: usize,
    gate: Vec<Vec<Vec<f32>>>,
    up: Vec<Vec<Vec<f32>>>,
    down: Vec<Vec<Vec<f32>>>,
}

impl Experts {
    fn new(width: usize) -> Self {
        let of = |base: usize, rows: usize, cols: usize| {
            let value = |e, r, c| (base + (e * 100 + r) * 100 + c) as f32;
            (0..E)
                .map(|e| (0..rows).map(|r| (0..cols).map(|c| value(e, r, c)).collect()).collect())
                .collect()
        };
        Self {
            width,
            gate: of(100_000, width, H),
            up: of(200_000, width, H),
            down: of(300_000, H, width),
        }
    }

    /// Gate and up as one matrix, one after the other or row by row.
    fn gate_up(&self, e: usize, interleaved: bool) -> Vec<Vec<f32>> {
        let (gate, up) = (self.gate[e].iter(), self.up[e].iter());
        match interleaved {
            true => gate.zip(up).flat_map(|(g, u)| [g.clone(), u.clone()]).collect(),
            false => gate.chain(up).cloned().collect(),
        }
    }
}

fn transpose(matrix: &[Vec<f32>]) -> Vec<Vec<f32>> {
    (0..matrix[0].len()).map(|col| matrix.iter().map(|row| row[col]).collect()).collect()
}

fn put(model: &mut Model, name: &str, shape: &[usize], rows: impl Iterator<Item = Vec<f32>>) {
    let values: Vec<f32> = rows.flatten().collect();
    assert_eq!(values.len(), shape.iter().product::<usize>());
    model.tensors.insert(name.into(), (shape.to_vec(), values));
}

fn stack(model: &mut Model, name: &str, matrices: Vec<Vec<Vec<f32>>>) {
    let shape = [matrices.len(), matrices[0].len(), matrices[0][0].len()];
    put(model, name, &shape, matrices.into_iter().flatten());
}

fn rows(matrix: &Matrix) -> Vec<Vec<f32>> {
    let row = |index| {
        let mut row = vec![0.0; matrix.cols()];
        matrix.decode_row(index, &mut row);
        row
    };
    (0..matrix.rows()).map(row).collect()
}

/// A model of `model_type` with the experts put in by `store`, which gets the block's path.
fn check(
    width: usize,
    model_type: &str,
    block: &str,
    rest: &[(&str, &[usize])],
    store: impl Fn(&Experts, &mut Model, &str),
) {
    let config = format!(
        r#"{{"model_type": "{model_type}", "intermediate_size": {width}, "d_model": 6,
            "moe_intermediate_size": {width}, "n_layers": 1, "share_expert_dim": 0,
            "ffn_config": {{"moe_num_experts": 3, "moe_top_k": 2, "ffn_hidden_size": {width}}}}}"#
    );
    let mut model = Model { config: merged(BASE, &config), ..Model::default() };
    for (name, shape) in rest {
        model.add(&format!("{block}.{name}"), shape);
    }
    let experts = Experts::new(width);
    store(&experts, &mut model, block);
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model.open(folder.path());
    let layers = architecture::layers(&checkpoint).unwrap();
    let layer = LoadedLayer::load(&checkpoint, &layers[0])
        .unwrap_or_else(|error| panic!("{model_type}: {error}"));
    assert_eq!(layer.experts.len(), E);
    for (e, expert) in layer.experts.iter().enumerate() {
        let Expert { gate, up, down, .. } = expert;
        assert_eq!(rows(gate.as_ref().unwrap()), experts.gate[e], "{model_type}: gate {e}");
        assert_eq!(rows(up), experts.up[e], "{model_type}: up {e}");
        assert_eq!(rows(down), experts.down[e], "{model_type}: down {e}");
        assert_eq!((up.rows(), up.cols()), (experts.width, H));
    }
}

/// Widths at which one of the stored arrays is square (3: 2·I = H, 6: I = H), and one at which
/// none is: the row decides, not the shape.
#[test]
fn six_layouts_hold_the_same_experts() {
    for width in [3, 4, 6] {
        check(
            width,
            "qwen3_moe",
            "model.layers.0.mlp",
            &[("gate.weight", &[E, H])],
            |x, m, block| {
                for e in 0..E {
                    let at = |name| format!("{block}.experts.{e}.{name}.weight");
                    put(m, &at("gate_proj"), &[x.width, H], x.gate[e].iter().cloned());
                    put(m, &at("up_proj"), &[x.width, H], x.up[e].iter().cloned());
                    put(m, &at("down_proj"), &[H, x.width], x.down[e].iter().cloned());
                }
            },
        );
        let stacked = |x: &Experts, m: &mut Model, block: &str| {
            let both = (0..E).map(|e| x.gate_up(e, false)).collect();
            stack(m, &format!("{block}.experts.gate_up_proj"), both);
            stack(m, &format!("{block}.experts.down_proj"), x.down.clone());
        };
        check(width, "qwen3_moe", "model.layers.0.mlp", &[("gate.weight", &[E, H])], stacked);
        check(
            width,
            "qwen3_vl_moe",
            "model.language_model.layers.0.mlp",
            &[("gate.weight", &[E, H])],
            |x, m, block| {
                let both = (0..E).map(|e| transpose(&x.gate_up(e, false))).collect();
                stack(m, &format!("{block}.experts.gate_up_proj"), both);
                let down = x.down.iter().map(|down| transpose(down)).collect();
                stack(m, &format!("{block}.experts.down_proj"), down);
            },
        );
        check(
            width,
            "step3p7",
            "model.layers.0.moe",
            &[("gate.weight", &[E, H]), ("router_bias", &[E])],
            |x, m, block| {
                stack(m, &format!("{block}.gate_proj.weight"), x.gate.clone());
                stack(m, &format!("{block}.up_proj.weight"), x.up.clone());
                stack(m, &format!("{block}.down_proj.weight"), x.down.clone());
            },
        );
        check(
            width,
            "dbrx",
            "transformer.blocks.0.ffn",
            &[("router.layer.weight", &[E, H])],
            |x, m, block| {
                let flat = [E * x.width, H];
                let down = x.down.iter().flat_map(|down| transpose(down));
                put(m, &format!("{block}.experts.mlp.w1"), &flat, x.gate.iter().flatten().cloned());
                put(m, &format!("{block}.experts.mlp.v1"), &flat, x.up.iter().flatten().cloned());
                put(m, &format!("{block}.experts.mlp.w2"), &flat, down);
            },
        );
        check(
            width,
            "inkling2",
            "model.llm.layers.0.mlp",
            &[("gate.weight", &[E, H]), ("gate.bias", &[E])],
            |x, m, block| {
                let both = (0..E).map(|e| x.gate_up(e, true)).collect();
                stack(m, &format!("{block}.experts.w13_weight"), both);
                stack(m, &format!("{block}.experts.w2_weight"), x.down.clone());
            },
        );
        check(
            width,
            "gpt_oss",
            "model.layers.0.mlp",
            &[
                ("router.weight", &[E, H]),
                ("router.bias", &[E]),
                ("experts.gate_up_proj_bias", &[E, 2 * width]),
                ("experts.down_proj_bias", &[E, H]),
            ],
            |x, m, block| {
                let both = (0..E).map(|e| transpose(&x.gate_up(e, true))).collect();
                stack(m, &format!("{block}.experts.gate_up_proj"), both);
                let down = x.down.iter().map(|down| transpose(down)).collect();
                stack(m, &format!("{block}.experts.down_proj"), down);
            },
        );
    }
}

/// A model whose row says transposed also loads the layout it has in memory, where the shapes
/// leave no doubt.
#[test]
fn unambiguous_shapes_overrule_the_row() {
    for width in [3, 4, 6] {
        check(
            width,
            "qwen3_vl_moe",
            "model.layers.0.mlp",
            &[("gate.weight", &[E, H])],
            |x, m, block| {
                let both = (0..E).map(|e| x.gate_up(e, false)).collect();
                stack(m, &format!("{block}.experts.gate_up_proj"), both);
                stack(m, &format!("{block}.experts.down_proj"), x.down.clone());
            },
        );
    }
}
