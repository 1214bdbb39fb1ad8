//! From a row, a config and the names in a checkpoint to the layers.

use super::row::{Architecture, Names, Renorm, Shared};
use super::rules::listed_kind;
use super::settings::Settings;
use super::tensors::{Experts, Form, LayerTensors, Projection, SharedTensors, StepTensors};
use super::variants::ExpertNames;
use super::{LayerEntry, TensorNames, variants};
use crate::checkpoint::Checkpoint;
use crate::spec::{
    Correction, Dims, ExpertSpec, GateSpec, Groups, LayerSpec, OutputSpec, Renormalise,
    RoutedScale, RouterSpec, Score, Selection, SharedSpec, Transform, TransformStep,
};
use crate::{Error, Result};

/// Everything that the layers of a model have in common.
pub(super) struct Model<'a> {
    pub row: &'a Architecture,
    pub settings: Settings,
    pub resolver: Resolver<'a>,
}

impl Model<'_> {
    /// All MoE layers, in order.
    pub(super) fn layers(&self) -> Result<Vec<LayerEntry>> {
        // some families have members without routed experts
        if self.settings.size(self.row.experts, 0)? == Some(0) {
            return Ok(Vec::new());
        }
        let mut moe = Vec::new();
        for layer in 0..self.settings.layers {
            if self.row.moe_layers.is_moe(&self.settings, layer)? {
                moe.push(layer);
            }
        }
        let (stem, names) = self.spelling(&moe);
        moe.into_iter().map(|layer| self.layer(&stem, &names, layer)).collect()
    }

    /// What is wrong with the layers that are no MoE layers.
    pub(super) fn overlooked(&self) -> Result<Vec<Error>> {
        let (mut moe, mut dense) = (Vec::new(), Vec::new());
        let experts = self.settings.size(self.row.experts, 0)? != Some(0);
        for layer in 0..self.settings.layers {
            match experts && self.row.moe_layers.is_moe(&self.settings, layer)? {
                true => moe.push(layer),
                false => dense.push(layer),
            }
        }
        let (stem, names) = self.spelling(&moe);
        let hybrid = self.settings.pattern()?.is_some();
        let index = self.resolver.index;
        let error = |layer: usize, reason: String| {
            Error::file(self.resolver.checkpoint.path(), format!("layer {layer} {reason}"))
        };
        let mut found = Vec::new();
        // a checkpoint of a few layers of a model is none of which the others lack something
        let layers = moe.iter().chain(&dense);
        let there = |layer: &&usize| index.any_below(&format!("{stem}{layer}."));
        for layer in layers.filter(there) {
            let scope = Scope::new(&stem, &names, *layer);
            let routed =
                self.resolver.routed(&names).find(|names| index.has_experts(&scope, names));
            if let Some(routed) = routed.filter(|_| dense.contains(layer)) {
                let name = scope.resolve(routed.up);
                found.push(error(
                    *layer,
                    format!("is dense by the configuration, but holds experts ('{name}')"),
                ));
                continue;
            }
            let below = index.below(&format!("{stem}{layer}.")).iter();
            let fed =
                below.copied().any(|name| FEED_FORWARD.iter().any(|part| name.contains(part)));
            if !fed && !hybrid {
                found.push(error(*layer, "has no feed-forward, neither dense nor experts".into()));
            }
        }
        Ok(found)
    }

    /// Where layers stand and what their tensors are called: of the known spellings the one that
    /// the checkpoint has most of. The row's come first, and win where others have no more.
    fn spelling(&self, moe: &[usize]) -> (String, Names) {
        let row = self.row;
        let known = row.stems.iter().chain(variants::STEMS).map(|stem| (*stem).to_string());
        let known: Vec<String> = known.filter(|stem| self.resolver.index.any_below(stem)).collect();
        let found = self.best(&known, moe);
        let found = found.or_else(|| self.best(&self.resolver.index.stems(), moe));
        found.unwrap_or_else(|| (row.stems[0].to_string(), row.names[0]))
    }

    fn best(&self, stems: &[String], moe: &[usize]) -> Option<(String, Names)> {
        let row = self.row;
        let elsewhere = variants::BLOCKS.iter().map(|block| Names { block, ..row.names[0] });
        let spellings: Vec<Names> = row.names.iter().copied().chain(elsewhere).collect();
        let mut best = None;
        let mut most = 0;
        for stem in stems {
            for names in &spellings {
                let found =
                    |layer: &usize| self.resolver.found(&Scope::new(stem, names, *layer), names);
                let found = moe.iter().map(found).sum();
                if found > most {
                    (best, most) = (Some((stem.clone(), *names)), found);
                }
            }
        }
        best
    }

    fn layer(&self, stem: &str, names: &Names, layer: usize) -> Result<LayerEntry> {
        let scope = Scope::new(stem, names, layer);
        let mut spec = self.spec(scope.block.clone(), layer)?;
        (self.row.adjust)(&self.settings, layer, &mut spec)?;
        spec.validate()?;
        let tensors = self.resolver.tensors(&scope, names, &spec);
        Ok(LayerEntry { spec, tensors })
    }

    fn spec(&self, name: String, layer: usize) -> Result<LayerSpec> {
        let (row, settings) = (self.row, &self.settings);
        let hidden = settings.need_size(row.hidden, layer)?;
        let intermediate = settings.need_size(row.intermediate, layer)?;
        let activation = settings.activation(row.activation.0, row.activation.1)?;
        // published configs have null here, also where the class would not take it
        let factor = match settings.states_null(row.scale) {
            true => 1.0,
            false => settings.number(row.scale, layer)?.unwrap_or(1.0),
        };
        let shared_width = match row.shared {
            Shared::No => 0,
            Shared::Width(keys) => settings.size(keys, layer)?.unwrap_or(0),
            Shared::Times(keys) => {
                settings.size(keys, layer)?.unwrap_or(0).saturating_mul(intermediate)
            }
            Shared::Same => intermediate,
        };
        Ok(LayerSpec {
            name,
            index: layer,
            dims: Dims { hidden, routed_hidden: hidden, intermediate },
            gate: GateSpec::default(),
            router: self.router(layer)?,
            expert: ExpertSpec { gated: true, activation, bias: row.expert_bias, norm: None },
            input_transform: Transform::default(),
            output_transform: Transform::default(),
            routed_scale: RoutedScale { factor, on: row.scale_on },
            shared: (shared_width > 0).then_some(SharedSpec {
                count: 1,
                intermediate: shared_width,
                gated: true,
                activation,
                bias: false,
                sigmoid_gate: !row.names[0].shared_gate.is_empty(),
                combine: row.combine,
                input_norm: None,
                output_norm: None,
            }),
            output: OutputSpec::default(),
        })
    }

    fn router(&self, layer: usize) -> Result<RouterSpec> {
        let (row, settings) = (self.row, &self.settings);
        let experts = settings.need_size(row.experts, layer)?;
        let top_k = settings.need_size(row.top_k, layer)?;
        let renormalise = match row.renormalise {
            Renorm::Never => Renormalise::None,
            Renorm::Always(eps) => Renormalise::Sum { eps },
            Renorm::If(keys, eps) if settings.flag(keys, false)? => Renormalise::Sum { eps },
            Renorm::If(..) => Renormalise::None,
        };
        let score = match settings.text(&["scoring_func"])? {
            Some(_) if !row.scoring_func => row.score,
            None => row.score,
            // dots1 publishes the name of the selection method here
            Some("sigmoid" | "noaux_tc") => Score::Sigmoid,
            Some("softmax") => Score::Softmax,
            Some("sqrtsoftplus") => Score::SqrtSoftplus,
            Some(other) => {
                return Err(settings.error(
                    &["scoring_func"],
                    format!("is '{other}'; known are sigmoid, softmax and sqrtsoftplus"),
                ));
            }
        };
        let groups = match row.groups {
            None => None,
            Some((score, fill)) => {
                let count = settings.size(&["n_group", "num_expert_group"], 0)?;
                let keep = settings.size(&["topk_group"], 0)?;
                match (count, keep) {
                    (None | Some(0 | 1), _) => None,
                    (Some(_), None) => return Err(settings.missing(&["topk_group"])),
                    (Some(count), Some(keep)) => Some(Groups { count, keep, score, fill }),
                }
            }
        };
        Ok(RouterSpec {
            score,
            correction: row.correction,
            groups,
            weight_from: row.weight_from,
            renormalise,
            weight_on: row.weight_on,
            ..RouterSpec::softmax(experts, top_k, false)
        })
    }
}

/// Parts of the names of feed-forward weights.
const FEED_FORWARD: &[&str] = &[
    ".mlp",
    ".ffn",
    "feed_forward",
    ".moe",
    "_moe.",
    ".mixer",
    "shared_mlp",
    "experts.",
    ".fc1",
    ".fc2",
    ".gate_proj",
    ".up_proj",
    ".wi",
    ".w1",
];

/// Endings of tensors that hold a matrix, or its codes.
const MATRICES: [&str; 6] =
    [".weight", "", ".weight_packed", "_packed", "_weight_packed", ".qweight"];

/// Finds the tensors of layers.
pub(super) struct Resolver<'a> {
    pub checkpoint: &'a Checkpoint,
    pub index: &'a TensorNames<'a>,
}

impl Resolver<'_> {
    /// How many of a block's kinds of tensors are there under these names.
    fn found(&self, scope: &Scope, names: &Names) -> usize {
        let module = |name: &str| !name.is_empty() && self.index.has_module(&scope.resolve(name));
        [
            module(self.gate(scope, names)),
            module(self.correction(scope, names)),
            self.shared(scope, names).iter().any(|shared| module(shared.up) || module(shared.down)),
            self.shared(scope, names)
                .iter()
                .any(|shared| module(shared.gate) && module(shared.up) && module(shared.down)),
            self.routed(names).any(|experts| self.index.has_experts(scope, &experts)),
        ]
        .into_iter()
        .filter(|found| *found)
        .count()
    }

    /// Whether other names than those of the row are looked for.
    fn varies(&self) -> bool {
        self.checkpoint.metadata().is_none()
    }

    /// Of `first` and `others` the name of a module that is there; `first`, if none is.
    fn there<'n>(&self, scope: &Scope, first: &'n str, others: &[&'n str]) -> &'n str {
        let there = |name: &&str| self.index.has_module(&scope.resolve(name));
        let others = others.iter().copied().filter(|_| self.varies() && !first.is_empty());
        std::iter::once(first).chain(others).find(there).unwrap_or(first)
    }

    fn gate(&self, scope: &Scope, names: &Names) -> &'static str {
        // a gate has weights: other tensors may stand below its name
        let weights = |name: &&str| {
            let module = scope.resolve(name);
            !name.is_empty()
                && ["", ".weight", ".qweight", ".weight_packed"]
                    .iter()
                    .any(|ending| self.index.contains(&format!("{module}{ending}")))
        };
        let others = variants::GATES.iter().copied().filter(|_| self.varies());
        std::iter::once(names.gate).chain(others).find(weights).unwrap_or(names.gate)
    }

    fn correction(&self, scope: &Scope, names: &Names) -> &'static str {
        let others = variants::CORRECTIONS;
        // the bias of a gate that has one corrects nothing
        let others: Vec<&'static str> =
            others.iter().copied().filter(|name| *name != names.gate_bias).collect();
        self.there(scope, names.correction, &others)
    }

    /// Ways in which routed experts may be stored, published ones first.
    fn routed(&self, names: &Names) -> impl Iterator<Item = ExpertNames> {
        let first = names.experts[0];
        let others = variants::EXPERTS.iter().filter(|_| self.varies()).copied();
        let others = others.map(move |names| ExpertNames { norm: first.norm, ..names });
        names.experts.iter().copied().chain(others)
    }

    /// Ways in which shared experts may be stored.
    fn shared(&self, _: &Scope, names: &Names) -> Vec<ExpertNames> {
        let others = variants::SHARED.iter().filter(|_| self.varies()).copied();
        std::iter::once(names.shared).chain(others).collect()
    }

    /// Where the weights of a layer stand.
    pub(super) fn tensors(&self, scope: &Scope, names: &Names, spec: &LayerSpec) -> LayerTensors {
        let given = |name: &str| (!name.is_empty()).then(|| scope.resolve(name));
        let needed = |needed: bool, name: &str| given(name).filter(|_| needed);
        let hash = matches!(spec.router.selection, Selection::HashTable { .. });
        let steps = |transform: &Transform, names: &[&str], width: usize| {
            let mut width = width;
            let steps = transform.steps.iter().zip(names).map(|(step, name)| match step {
                TransformStep::RmsNorm(_) => StepTensors::RmsNorm(scope.resolve(name)),
                TransformStep::Linear { width: out } => {
                    let module = scope.resolve(name);
                    let cols = std::mem::replace(&mut width, *out);
                    StepTensors::Linear(Projection::whole(module, *out, cols))
                }
            });
            steps.collect::<Vec<_>>()
        };
        let ways: Vec<ExpertNames> = self.routed(names).collect();
        let routed = |stacked| {
            self.best_way(scope, &ways, |names| Experts {
                stacked,
                ..routed_experts(scope, names, spec)
            })
        };
        let experts = routed(spec.router.experts);
        let behind = self.shared_behind(scope, names, spec, &experts);
        // whose first dimension tells how they are stored
        let experts = behind.as_ref().map_or(experts, |shared| routed(shared.stacked));
        let behind = behind.map(|shared| Experts {
            count: shared.count,
            first: shared.first,
            ..experts.clone()
        });
        let shared = spec.shared.as_ref().map(|shared| SharedTensors {
            experts: behind.unwrap_or_else(|| {
                self.best_way(scope, &self.shared(scope, names), |names| Experts {
                    count: shared.count,
                    stacked: shared.count,
                    intermediate: shared.intermediate,
                    hidden: spec.dims.hidden,
                    ..self::experts(scope, names, shared.gated, shared.bias, false)
                })
            }),
            gate: needed(shared.sigmoid_gate, names.shared_gate),
            input_norm: needed(shared.input_norm.is_some(), names.shared_norms[0]),
            output_norm: needed(shared.output_norm.is_some(), names.shared_norms[1]),
        });
        LayerTensors {
            gate: Projection::whole(
                scope.resolve(self.gate(scope, names)),
                spec.router.logits(),
                spec.dims.hidden,
            ),
            gate_bias: needed(spec.gate.bias, names.gate_bias),
            correction: needed(
                spec.router.correction != Correction::None,
                self.correction(scope, names),
            ),
            per_expert_scale: needed(spec.router.per_expert_scale, names.per_expert_scale),
            gate_input_scale: needed(spec.gate.scaled_rms_eps.is_some(), names.gate_input_scale),
            global_scale: given(names.global_scale),
            hash_table: needed(hash, names.hash_table),
            experts,
            experts_by_module: self
                .routed(names)
                .find(|names| names.form == Form::Each)
                .map(|names| routed_experts(scope, &names, spec)),
            input_transform: steps(&spec.input_transform, names.input_transform, spec.dims.hidden),
            output_transform: steps(
                &spec.output_transform,
                names.output_transform,
                spec.dims.routed_hidden,
            ),
            shared,
            output_bias: needed(spec.output.bias, names.output_bias),
            output_norm: needed(spec.output.norm.is_some(), names.output_norm),
            scopes: match names.scopes {
                [] => vec![scope.resolve("")],
                scopes => scopes.iter().map(|name| scope.resolve(name)).collect(),
            },
        }
    }

    /// Shared experts that stand behind the routed ones in the same stacks: where they have no names of
    /// their own, and are like routed ones.
    fn shared_behind(
        &self,
        scope: &Scope,
        names: &Names,
        spec: &LayerSpec,
        routed: &Experts,
    ) -> Option<Experts> {
        let shared = spec.shared.as_ref().filter(|_| self.varies())?;
        let own = self.shared(scope, names);
        let (first, stacked) = (routed.count, routed.count + shared.count);
        let behind = Experts { count: shared.count, first, stacked, ..routed.clone() };
        let up = behind.get(0).up;
        let mut found = MATRICES.iter().map(|e| self.checkpoint.info(&format!("{}{e}", up.module)));
        let stack = found.find_map(|info| info).filter(|_| up.part.stack.is_some());
        let is_there = stack.is_some_and(|info| info.shape.first() == Some(&stacked));
        let alike = (shared.intermediate, spec.dims.hidden, shared.gated, shared.bias)
            == (routed.intermediate, routed.hidden, routed.gate.is_some(), routed.bias.is_some());
        let apart = own.iter().any(|names| self.index.has_experts(scope, names));
        (is_there && alike && !apart && routed.form != Form::Flat).then_some(behind)
    }

    /// The way in which this checkpoint stores experts: the first of which every projection is there
    /// in a shape that fits, else the first that is whole, else the first that is there at all.
    fn best_way(
        &self,
        scope: &Scope,
        ways: &[ExpertNames],
        experts: impl Fn(&ExpertNames) -> Experts,
    ) -> Experts {
        let there: Vec<Experts> = ways
            .iter()
            .filter(|names| self.index.has_experts(scope, names))
            .map(|names| (names, experts(names)))
            // experts without a gate have one projection of that width, which stands alone
            .filter(|(names, way)| way.gate.is_some() || names.gate != names.up)
            .map(|(_, way)| way)
            .collect();
        let whole = |way: &&Experts| {
            let expert = way.get(0);
            let projections = expert.gate.iter().chain([&expert.up, &expert.down]);
            projections.into_iter().all(|projection| self.index.has_module(&projection.module))
        };
        let fits = |way: &&Experts| {
            let expert = way.get(0);
            [&expert.up, &expert.down].iter().all(|projection| {
                let info = MATRICES
                    .iter()
                    .find_map(|e| self.checkpoint.info(&format!("{}{e}", projection.module)));
                info.is_none_or(|info| projection.may_be_stored_as(info.shape))
            })
        };
        let best = there.iter().find(|way| whole(way) && fits(way));
        let best = best.or_else(|| there.iter().find(whole)).or(there.first());
        best.cloned().unwrap_or_else(|| experts(&ways[0]))
    }
}

/// The rule for the routed experts' tensors.
fn routed_experts(scope: &Scope, names: &ExpertNames, spec: &LayerSpec) -> Experts {
    let norm = spec.expert.norm.is_some();
    Experts {
        count: spec.router.experts,
        stacked: spec.router.experts,
        intermediate: spec.dims.intermediate,
        hidden: spec.dims.routed_hidden,
        ..experts(scope, names, spec.expert.gated, spec.expert.bias, norm)
    }
}

/// The rule for the experts' tensors, sizes left open.
fn experts(scope: &Scope, names: &ExpertNames, gated: bool, bias: bool, norm: bool) -> Experts {
    Experts {
        count: 0,
        first: 0,
        stacked: 0,
        intermediate: 0,
        hidden: 0,
        form: names.form,
        interleaved: names.interleaved,
        gate: gated.then(|| scope.resolve(names.gate)),
        up: scope.resolve(names.up),
        down: scope.resolve(names.down),
        bias: bias.then(|| names.bias.to_string()),
        norm: norm.then(|| scope.resolve(names.norm)),
    }
}

/// Where the names of one layer begin.
pub(super) struct Scope {
    /// The decoder layer's path.
    layer: String,
    /// The block's path.
    pub block: String,
}

impl Scope {
    pub(super) fn new(stem: &str, names: &Names, layer: usize) -> Self {
        let layer = format!("{stem}{layer}");
        let block = match names.block {
            "" => layer.clone(),
            block => format!("{layer}.{block}"),
        };
        Self { layer, block }
    }

    /// The full name of `name`, which is relative to the block, or with `../` to the layer.
    pub(super) fn resolve(&self, name: &str) -> String {
        match name.strip_prefix("../") {
            Some(name) => format!("{}.{name}", self.layer),
            None => format!("{}.{name}", self.block),
        }
    }
}

impl TensorNames<'_> {
    /// Whether tensors of a module are there, in any number format.
    pub(super) fn has_module(&self, module: &str) -> bool {
        self.below(module)
            .iter()
            .any(|name| matches!(name.as_bytes().get(module.len()), None | Some(b'.' | b'_')))
    }

    /// Beginnings of names that look like a list of layers, in order.
    pub(super) fn stems(&self) -> Vec<String> {
        let mut stems: Vec<String> = Vec::new();
        for name in self.below("") {
            let Some((before, _)) = name.split_once("layers.") else { continue };
            let stem = format!("{before}layers.");
            if stems.len() < 64 && stems.last() != Some(&stem) && !stems.contains(&stem) {
                stems.push(stem);
            }
        }
        stems
    }

    /// Whether a tensor has this very name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.binary_search(&name).is_ok()
    }

    /// Whether experts stored in this way are there: any of their up or down projections.
    fn has_experts(&self, scope: &Scope, names: &ExpertNames) -> bool {
        [names.up, names.down].into_iter().any(|name| {
            let module = scope.resolve(name);
            match module.split_once("{e}") {
                None if names.marker.is_empty() => self.has_module(&module),
                None => self.any_below(&(module + names.marker)),
                // of one expert, and of another where that one lacks it
                Some((before, after)) => {
                    let names = self.below(before);
                    names.first().into_iter().chain(names.last()).any(|name| {
                        let rest = &name[before.len()..];
                        let digits = rest.len() - rest.trim_start_matches(char::is_numeric).len();
                        digits > 0
                            && self.has_module(&format!("{before}{}{after}", &rest[..digits]))
                    })
                }
            }
        })
    }
}

/// The kind of an MoE layer in `mlp_layer_types`, for rows that tell kinds apart. Without that list,
/// the first `num_hash_layers` (three, where the key is absent) choose by token.
pub(super) fn is_hash_layer(settings: &Settings, layer: usize) -> Result<bool> {
    Ok(match listed_kind(settings, layer)? {
        Some(kind) => kind == "hash_moe",
        None => layer < settings.size(&["num_hash_layers"], 0)?.unwrap_or(3),
    })
}
