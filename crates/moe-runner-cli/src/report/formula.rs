//! A layer's arithmetic as formulas.

use moe_runner::spec::{
    Activation, Correction, GroupFill, GroupScore, IdleExperts, LayerSpec, Renormalise, RouterSpec,
    Score, Selection, SharedCombine, SharedSpec, Transform, TransformStep, WeightFrom, WeightOn,
};

/// Logits, choice and weights, a line each.
pub(crate) fn routing(spec: &LayerSpec) -> Vec<String> {
    vec![logits(spec), ids(&spec.router), weights(spec)]
}

fn logits(spec: &LayerSpec) -> String {
    let x = if spec.gate.scaled_rms_eps.is_some() { "rms(x)·scale/√H" } else { "x" };
    let mut text = format!("{x}·Wgᵀ");
    if spec.gate.bias {
        text += " + b";
    }
    if spec.router.logit_multiplier != 1.0 {
        text = format!("({text})·{}", spec.router.logit_multiplier);
    }
    if let Some(cap) = spec.router.soft_cap {
        text = format!("{cap}·tanh(({text})/{cap})");
    }
    format!("logits = {text}")
}

fn score(router: &RouterSpec) -> &'static str {
    match router.score {
        Score::Softmax => "softmax(logits)",
        Score::Sigmoid => "σ(logits)",
        Score::SqrtSoftplus => "√softplus(logits)",
        Score::Logits => "logits",
    }
}

fn ids(router: &RouterSpec) -> String {
    let choice = match router.correction {
        Correction::None => score(router).to_owned(),
        Correction::OnScore => format!("{} + bias", score(router)),
        Correction::OnLogits => "logits + bias".to_owned(),
    };
    let k = router.top_k;
    let chosen = match router.selection {
        Selection::TopK => format!("top-{k} of {choice}"),
        Selection::TopKPerGroup { groups } => {
            format!("top-{} of {choice} in each of {groups} groups", k / groups.max(1))
        }
        Selection::SparseMixer { eps } => format!("sparsemixer(logits, ε {eps})"),
        Selection::HashTable { vocabulary } => format!("table[token id], {vocabulary} rows"),
    };
    let Some(groups) = router.groups else { return format!("ids    = {chosen}") };
    let by = match groups.score {
        GroupScore::Max => "best expert",
        GroupScore::TopTwoSum => "sum of best two",
    };
    let fill = match groups.fill {
        GroupFill::NegativeInfinity => "",
        GroupFill::Zero => ", the others' choice 0",
    };
    let Some(count) = Some(groups.count).filter(|count| *count > 0) else { return chosen };
    format!("ids    = {chosen}, in the best {} of {count} groups (by {by}{fill})", groups.keep)
}

fn weights(spec: &LayerSpec) -> String {
    let router = &spec.router;
    let from = match router.weight_from {
        _ if matches!(router.selection, Selection::SparseMixer { .. }) => {
            "softmax near each choice".to_owned()
        }
        WeightFrom::Score => format!("{}[ids]", score(router)),
        WeightFrom::SoftmaxChosen => "softmax(logits[ids])".to_owned(),
        WeightFrom::SigmoidChosen => "σ(logits[ids])".to_owned(),
        WeightFrom::JointSoftmax { shared } => {
            format!("softmax(log σ(logits[ids and {shared} shared]))")
        }
    };
    let mut text = match router.renormalise {
        Renormalise::None => format!("w      = {from}"),
        Renormalise::Sum { eps: 0.0 } => format!("w      = {from}, divided by their sum"),
        Renormalise::Sum { eps } => format!("w      = {from}, divided by (their sum + {eps:e})"),
        Renormalise::SumFloor { floor } => {
            format!("w      = {from}, divided by max(their sum, {floor:e})")
        }
        Renormalise::PNorm { p } => format!("w      = {from}, divided by their {p}-norm"),
    };
    if spec.routed_scale.factor != 1.0 {
        text += &format!(" · {}", spec.routed_scale.factor);
    }
    if router.per_expert_scale {
        text += " · scale[ids]";
    }
    text
}

/// What the layer returns.
pub(crate) fn output(spec: &LayerSpec) -> String {
    let h = transformed(&spec.input_transform, "x");
    let mut y = match spec.router.weight_on {
        WeightOn::Output => format!("Σ w·expert({h})"),
        WeightOn::Input => format!("Σ expert(w·{h})"),
    };
    match spec.router.idle {
        Some(IdleExperts::Identity { count }) => {
            y += &format!(" (ids from {}: {count} × identity)", spec.router.experts);
        }
        Some(IdleExperts::Skip { count }) => {
            y += &format!(" (ids from {}: {count} × nothing)", spec.router.experts);
        }
        None => {}
    }
    y = transformed(&spec.output_transform, &y);
    if let Some(shared) = &spec.shared {
        let branch = shared_branch(shared);
        y = match shared.combine {
            SharedCombine::Add => format!("{y} + {branch}"),
            SharedCombine::Average => format!("({y} + {branch})/2"),
            SharedCombine::RouterWeighted => format!("{y} + Σ w·{branch}"),
        };
    }
    if spec.output.bias {
        y += " + bias";
    }
    if spec.output.norm.is_some() {
        y = format!("rmsnorm({y})");
    }
    if spec.output.multiplier != 1.0 {
        y = format!("({y})·{}", spec.output.multiplier);
    }
    format!("y      = {y}")
}

fn shared_branch(shared: &SharedSpec) -> String {
    let x = if shared.input_norm.is_some() { "rmsnorm(x)" } else { "x" };
    let mut text = format!("shared({x})");
    if shared.sigmoid_gate {
        text = format!("σ(x·ws)·{text}");
    }
    if shared.output_norm.is_some() {
        text = format!("rmsnorm({text})");
    }
    text
}

fn transformed(transform: &Transform, x: &str) -> String {
    transform.steps.iter().fold(x.to_owned(), |x, step| match step {
        TransformStep::Linear { width } => format!("linear→{width}({x})"),
        TransformStep::RmsNorm(_) => format!("rmsnorm({x})"),
    })
}

/// An expert: `expert(h) = Wd·(silu(g)·u), g = Wg·h, u = Wu·h`.
pub(crate) fn expert(gated: bool, activation: Activation, bias: bool, norm: bool) -> String {
    let g = if gated { "g" } else { "u" };
    let function = match activation {
        Activation::Silu => format!("silu({g})"),
        Activation::Gelu => format!("gelu({g})"),
        Activation::GeluTanh => format!("gelu_tanh({g})"),
        Activation::Relu => format!("relu({g})"),
        Activation::Relu2 => format!("relu({g})²"),
        Activation::ClampedSwiglu { alpha, .. } => format!("{g}·σ({alpha}·{g})"),
        Activation::SwigluStep { limit } => format!("min(silu({g}), {limit})"),
        Activation::Situ { beta, .. } => format!("{beta}·tanh({g}/{beta})·σ({g})"),
    };
    let up = match activation {
        Activation::ClampedSwiglu { beta: 0.0, .. } => "u".to_owned(),
        Activation::ClampedSwiglu { beta, .. } => format!("(u + {beta})"),
        Activation::Situ { lambda: Some(lambda), .. } => format!("{lambda}·tanh(u/{lambda})"),
        _ => "u".to_owned(),
    };
    let middle = if gated { format!("{function}·{up}") } else { function };
    let clamp = match activation {
        Activation::ClampedSwiglu { limit, .. } if gated => {
            format!(", g at most {limit}, u within ±{limit}")
        }
        Activation::ClampedSwiglu { limit, .. } => format!(", u at most {limit}"),
        Activation::SwigluStep { limit } if gated => format!(", u within ±{limit}"),
        _ => String::new(),
    };
    let biases = if bias { ", biases on all" } else { "" };
    let normed = if norm { ", then rmsnorm" } else { "" };
    let gate = if gated { "g = Wg·h, " } else { "" };
    format!("expert(h) = Wd·({middle}), {gate}u = Wu·h{clamp}{biases}{normed}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_with_and_without_a_gate() {
        let situ = Activation::Situ { beta: 4.0, lambda: Some(25.0) };
        for (gated, activation, expected) in [
            (true, Activation::Silu, "Wd·(silu(g)·u), g = Wg·h, u = Wu·h"),
            (false, Activation::GeluTanh, "Wd·(gelu_tanh(u)), u = Wu·h"),
            (false, Activation::Relu2, "Wd·(relu(u)²), u = Wu·h"),
            (true, situ, "Wd·(4·tanh(g/4)·σ(g)·25·tanh(u/25)), g = Wg·h, u = Wu·h"),
        ] {
            assert_eq!(
                expert(gated, activation, false, false),
                format!("expert(h) = {expected}"),
                "{activation:?}"
            );
        }
    }
}
