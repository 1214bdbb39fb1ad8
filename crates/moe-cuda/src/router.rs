//! Routing on the device: from logits to expert ids and weights.

use crate::fault::FaultWord;
use crate::module::{Argument, Function, Launch, Modules};
use crate::rows::Float;
use crate::sources::ROUTE;
use crate::{Buffer, Error, Result, Rows, Stream, View, ViewMut};

/// How logits become ids and weights; the meaning of every option is that of moe-runner's
/// `RouterSpec`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterOptions {
    /// Experts with weights.
    pub experts: usize,
    /// Further ids without weights: identity and skip experts.
    pub idle: usize,
    /// Shared experts whose logits stand after all others, for [`WeightFrom::JointSoftmax`].
    pub shared: usize,
    /// k.
    pub top_k: usize,
    /// Multiplies the logits.
    pub logit_multiplier: f32,
    /// `tanh(l / c) · c`.
    pub soft_cap: Option<f32>,
    /// From logits to scores.
    pub score: Score,
    /// Where the bias enters the choice.
    pub correction: Correction,
    /// Choose among the best groups only.
    pub groups: Option<Groups>,
    /// How ids are chosen.
    pub selection: Selection,
    /// Where weights come from.
    pub weight_from: WeightFrom,
    /// What is done to a token's weights.
    pub renormalise: Renormalise,
    /// Multiplies every weight.
    pub scale: f32,
}

impl RouterOptions {
    /// Plain softmax routing: where other rules begin.
    pub const fn softmax(experts: usize, top_k: usize, renormalise: Renormalise) -> Self {
        Self {
            experts,
            idle: 0,
            shared: 0,
            top_k,
            logit_multiplier: 1.0,
            soft_cap: None,
            score: Score::Softmax,
            correction: Correction::None,
            groups: None,
            selection: Selection::TopK,
            weight_from: WeightFrom::Score,
            renormalise,
            scale: 1.0,
        }
    }
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Over all choices.
    Softmax,
    /// Each by itself.
    Sigmoid,
    /// `√(ln(1 + eˡ))`.
    SqrtSoftplus,
    /// The logits themselves.
    Logits,
}

/// Where the correction bias enters the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Correction {
    /// There is none.
    None,
    /// Added to the score.
    OnScore,
    /// Added to the logit.
    OnLogits,
}

/// Choice among the best of `count` contiguous groups, at most 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups.
    pub count: usize,
    /// Groups that stay.
    pub keep: usize,
    /// A group is rated by the sum of its best two, not by its best.
    pub top_two_sum: bool,
    /// The choice of the others' experts becomes 0, not −∞.
    pub fill_zero: bool,
}

/// How ids are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Selection {
    /// The k largest; ties to the lowest id.
    TopK,
    /// `k / groups` of each of `groups` contiguous groups.
    TopKPerGroup {
        /// Number of groups.
        groups: usize,
    },
    /// The two largest, each weighed by a softmax over the logits within `2·eps` of the largest.
    SparseMixer {
        /// Width of the band.
        eps: f32,
    },
    /// A table `[vocabulary, k]`, by token id.
    HashTable {
        /// Rows of the table.
        vocabulary: usize,
    },
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFrom {
    /// The score of the chosen.
    Score,
    /// Softmax over the logits of the chosen.
    SoftmaxChosen,
    /// Sigmoid of each chosen one's logit.
    SigmoidChosen,
    /// Softmax over the log-sigmoids of the chosen and of the shared experts' logits.
    JointSoftmax,
}

/// What is done to the weights of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Renormalise {
    /// Nothing.
    None,
    /// Divided by their sum plus this.
    Sum(f32),
    /// Divided by their sum, or this if it is more.
    SumFloor(f32),
    /// Divided by their p-norm.
    PNorm(f32),
}

/// What a router reads beside logits.
#[derive(Debug, Default)]
pub struct RouterTensors {
    /// `[experts + idle]`: the correction bias.
    pub bias: Option<Buffer<f32>>,
    /// `[experts]`: multiplies weights by id.
    pub per_expert_scale: Option<Buffer<f32>>,
    /// `[vocabulary, k]`: ids by token id. Each must be a choice of this layer; whoever uploads the
    /// table checks that.
    pub table: Option<Buffer<u32>>,
}

/// A layer's router on the device.
pub struct Router {
    options: RouterOptions,
    tensors: RouterTensors,
    raw: RawRouter,
    route: Function,
    shared_bytes: u32,
}

/// Where ids and weights go.
#[derive(Debug)]
pub struct RoutingMut<'a> {
    /// `[T, k]`: ids, best first. `u32::MAX` for tokens with a fault.
    pub ids: ViewMut<'a, u32>,
    /// `[T, k]`: weights.
    pub weights: ViewMut<'a, f32>,
    /// `[T, shared]`: weights of shared experts under a joint softmax; else empty.
    pub shared_weights: ViewMut<'a, f32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawRouter {
    experts: u32,
    choices: u32,
    logits: u32,
    top_k: u32,
    multiplier: f32,
    soft_cap: f32,
    score: u32,
    correction: u32,
    groups: u32,
    keep: u32,
    top_two: u32,
    fill_zero: u32,
    selection: u32,
    selection_groups: u32,
    sparse_eps: f32,
    vocabulary: u32,
    weight_from: u32,
    renormalise: u32,
    renormalise_by: f32,
    scale: f32,
    bias: u64,
    per_expert: u64,
    table: u64,
}

// SAFETY: `struct Router` of route.cu.
unsafe impl Argument for RawRouter {}

const GIVEN: u32 = 4;

impl RawRouter {
    /// Its rules as constants of a kernel that knows them: few.cu.
    pub(crate) fn options(&self) -> Vec<String> {
        let constants = [
            ("GATE_OUTPUTS", self.logits),
            ("GATE_TOP_K", self.top_k),
            ("SCORE", self.score),
            ("CORRECTION", self.correction),
            ("SELECTION", self.selection),
            ("WEIGHT_FROM", self.weight_from),
            ("RENORMALISE", self.renormalise),
            ("ROUTER_GROUPS", u32::from(self.groups > 0)),
            ("SOFT_CAP", u32::from(self.soft_cap > 0.0)),
            ("PER_EXPERT", u32::from(self.per_expert != 0)),
        ];
        constants.map(|(name, value)| format!("-D{name}={value}")).into()
    }

    /// Softmax over all experts, renormalised: the commonest rules.
    pub(crate) fn plain() -> Self {
        let options = RouterOptions::softmax(128, 8, Renormalise::Sum(0.0));
        raw(&options, &RouterTensors::default(), 128, 128)
    }
}

impl Router {
    /// A router of these options and tensors.
    ///
    /// # Errors
    /// If options contradict each other, a tensor is missing or too many or of the wrong length, or
    /// there are more experts than a block can choose among.
    pub fn new(modules: &Modules, options: RouterOptions, tensors: RouterTensors) -> Result<Self> {
        let o = &options;
        let choices = o.experts.saturating_add(o.idle);
        let logits = choices.saturating_add(o.shared);
        check(o, choices)?;
        let vocabulary = match o.selection {
            Selection::HashTable { vocabulary } => Some(vocabulary),
            _ => None,
        };
        let bias = (o.correction != Correction::None).then_some(choices);
        length("correction bias", tensors.bias.as_ref().map(Buffer::len), bias)?;
        if let Some(scales) = &tensors.per_expert_scale {
            length("per-expert scale", Some(scales.len()), Some(o.experts))?;
        }
        length(
            "hash table",
            tensors.table.as_ref().map(Buffer::len),
            vocabulary.map(|v| v * o.top_k),
        )?;

        let shared_bytes =
            8 * (logits + choices + o.top_k + o.shared) + 4 * (choices + o.top_k) + choices;
        let most = modules.gpu().properties().shared_bytes;
        if shared_bytes + 1024 > most {
            let reason = format!("{logits} logits take {shared_bytes} bytes of a block's {most}");
            return Err(Error::input("router", reason));
        }
        let route = modules.function(&ROUTE, &["--fmad=false".into()], "route")?;
        route.allow_shared(shared_bytes as u32)?;
        let raw = raw(o, &tensors, choices, logits);
        Ok(Self { options, tensors, raw, route, shared_bytes: shared_bytes as u32 })
    }

    /// Its options.
    pub fn options(&self) -> &RouterOptions {
        &self.options
    }

    /// Its tensors.
    pub fn tensors(&self) -> &RouterTensors {
        &self.tensors
    }

    /// Logits of a row.
    pub(crate) fn logits(&self) -> usize {
        self.raw.logits as usize
    }

    /// Shared memory that the kernel works in.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.shared_bytes as usize
    }

    pub(crate) fn raw(&self) -> RawRouter {
        self.raw
    }

    /// Routes the rows of `logits`, `[T, experts + idle + shared]` in f32. `input_ids`, `[T]`, are
    /// read by a hash table only.
    ///
    /// Logits that are NaN or +∞, and token ids outside the table, raise the fault; such a token gets
    /// no experts. −∞ masks an expert.
    ///
    /// # Errors
    /// If a length does not fit, or an earlier step failed.
    pub fn route(
        &self,
        stream: &Stream,
        logits: Rows<'_>,
        input_ids: Option<View<'_, u32>>,
        out: &mut RoutingMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        if matches!(self.options.selection, Selection::HashTable { .. })
            && input_ids.is_none_or(|ids| ids.len() != logits.rows())
        {
            return Err(Error::input("router", "a hash table needs the id of each token"));
        }
        self.launch(stream, logits, input_ids, None, out, fault)
    }

    /// Weighs experts that were chosen elsewhere, `chosen` `[T, k]`, by this layer's rules. Ids that
    /// are no choice of the layer raise the fault.
    ///
    /// # Errors
    /// As [`Self::route`].
    pub fn route_to(
        &self,
        stream: &Stream,
        logits: Rows<'_>,
        chosen: View<'_, u32>,
        out: &mut RoutingMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        length("chosen ids", Some(chosen.len()), Some(logits.rows() * self.options.top_k))?;
        self.launch(stream, logits, None, Some(chosen), out, fault)
    }

    fn launch(
        &self,
        stream: &Stream,
        logits: Rows<'_>,
        input_ids: Option<View<'_, u32>>,
        chosen: Option<View<'_, u32>>,
        out: &mut RoutingMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        let tokens = logits.rows();
        logits.expect("router logits", tokens, self.raw.logits as usize)?;
        if logits.float() != Float::F32 {
            return Err(Error::input("router logits", "they are not f32"));
        }
        let slots = tokens * self.options.top_k;
        length("ids", Some(out.ids.len()), Some(slots))?;
        length("weights", Some(out.weights.len()), Some(slots))?;
        length(
            "shared weights",
            Some(out.shared_weights.len()),
            Some(tokens * self.options.shared),
        )?;
        if tokens == 0 {
            return Ok(());
        }
        let mut raw = self.raw;
        if chosen.is_some() {
            raw.selection = GIVEN;
        }
        let launch = Launch {
            grid: (tokens as u32, 1),
            block: 128,
            shared: self.shared_bytes,
            cooperative: false,
        };
        let pointer = |view: Option<View<'_, u32>>| view.map_or(0, |view| view.pointer);
        let (input_ids, chosen) = (pointer(input_ids), pointer(chosen));
        // SAFETY: the parameters of `route`; lengths were checked above.
        unsafe {
            self.route.launch(
                stream,
                launch,
                &[
                    &logits.raw.data,
                    &logits.raw.stride,
                    &raw,
                    &input_ids,
                    &chosen,
                    &out.ids.pointer,
                    &out.weights.pointer,
                    &out.shared_weights.pointer,
                    &fault.view().pointer,
                ],
            )
        }
    }
}

fn raw(o: &RouterOptions, tensors: &RouterTensors, choices: usize, logits: usize) -> RawRouter {
    let groups =
        o.groups.unwrap_or(Groups { count: 0, keep: 0, top_two_sum: false, fill_zero: false });
    let (selection, selection_groups, sparse_eps, vocabulary) = match o.selection {
        Selection::TopK => (0, 1, 0.0, 0),
        Selection::TopKPerGroup { groups } => (1, groups, 0.0, 0),
        Selection::SparseMixer { eps } => (2, 1, eps, 0),
        Selection::HashTable { vocabulary } => (3, 1, 0.0, vocabulary),
    };
    let (renormalise, renormalise_by) = match o.renormalise {
        Renormalise::None => (0, 0.0),
        Renormalise::Sum(eps) => (1, eps),
        Renormalise::SumFloor(floor) => (2, floor),
        Renormalise::PNorm(p) => (3, p),
    };
    RawRouter {
        experts: o.experts as u32,
        choices: choices as u32,
        logits: logits as u32,
        top_k: o.top_k as u32,
        multiplier: o.logit_multiplier,
        soft_cap: o.soft_cap.unwrap_or(0.0),
        score: o.score as u32,
        correction: o.correction as u32,
        groups: groups.count as u32,
        keep: groups.keep as u32,
        top_two: u32::from(groups.top_two_sum),
        fill_zero: u32::from(groups.fill_zero),
        selection,
        selection_groups: selection_groups as u32,
        sparse_eps,
        vocabulary: vocabulary as u32,
        weight_from: o.weight_from as u32,
        renormalise,
        renormalise_by,
        scale: o.scale,
        bias: tensors.bias.as_ref().map_or(0, |b| b.view().pointer),
        per_expert: tensors.per_expert_scale.as_ref().map_or(0, |b| b.view().pointer),
        table: tensors.table.as_ref().map_or(0, |b| b.view().pointer),
    }
}

/// What the kernel takes for granted.
fn check(o: &RouterOptions, choices: usize) -> Result<()> {
    let refuse = |reason: String| Err(Error::input("router", reason));
    if o.experts == 0 || o.top_k == 0 || o.top_k > choices {
        return refuse(format!("top-k is {}, of {choices} choices", o.top_k));
    }
    if !(o.logit_multiplier.is_finite() && o.scale.is_finite()) {
        return refuse(format!("multiplier {}, scale {}", o.logit_multiplier, o.scale));
    }
    if o.soft_cap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
        return refuse(format!("soft cap {:?}", o.soft_cap));
    }
    if (o.shared > 0) != (o.weight_from == WeightFrom::JointSoftmax) {
        return refuse(format!("{} shared experts with {:?}", o.shared, o.weight_from));
    }
    if let Some(Groups { count, keep, top_two_sum, fill_zero }) = o.groups {
        let divides = count > 0 && count <= 64 && choices.is_multiple_of(count);
        let size = if divides { choices / count } else { 0 };
        if !divides || keep == 0 || keep > count || (top_two_sum && size < 2) {
            return refuse(format!("{keep} of {count} groups (at most 64) of {choices} choices"));
        }
        if !fill_zero && o.top_k > keep * size {
            return refuse(format!("top-k {} of {keep} groups of {size}", o.top_k));
        }
    }
    match o.selection {
        Selection::TopKPerGroup { groups }
            if groups == 0
                || o.groups.is_some()
                || !choices.is_multiple_of(groups)
                || !o.top_k.is_multiple_of(groups) =>
        {
            refuse(format!("{groups} groups of {choices} choices with top-k {}", o.top_k))
        }
        Selection::SparseMixer { .. } if o.top_k != 2 => refuse("sparsemixer chooses two".into()),
        _ => Ok(()),
    }
}

fn length(what: &'static str, is: Option<usize>, should: Option<usize>) -> Result<()> {
    match (is, should) {
        (Some(is), Some(should)) if is != should => {
            Err(Error::input(what, format!("{is} values, not {should}")))
        }
        (None, Some(should)) => {
            Err(Error::input(what, format!("missing; {should} values are needed")))
        }
        (Some(_), None) => Err(Error::input(what, "given, but the options use none")),
        _ => Ok(()),
    }
}
