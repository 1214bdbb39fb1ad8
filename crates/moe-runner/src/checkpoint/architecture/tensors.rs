//! Which stored arrays make up one layer: names and parts, no numbers.

/// Where every weight of a layer stands in the checkpoint. Names are full tensor names, except in
/// [`Projection`], whose tensors' endings depend on the number format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTensors {
    /// The gate `[E_total, H]`.
    pub gate: Projection,
    /// `[E_total]`: bias of the gate.
    pub gate_bias: Option<String>,
    /// `[choices]`: the correction bias.
    pub correction: Option<String>,
    /// `[E]`: multiplies weights by id.
    pub per_expert_scale: Option<String>,
    /// `[H]`: scale of the gate's own input norm.
    pub gate_input_scale: Option<String>,
    /// `[1]`: multiplies the routed scaling factor (inkling).
    pub global_scale: Option<String>,
    /// `[vocabulary, k]`: expert ids by token id.
    pub hash_table: Option<String>,
    /// The routed experts, by logical id.
    pub experts: Experts,
    /// The routed experts by the architecture's names for a module each, whatever names this
    /// checkpoint has: quantised checkpoints are published under them. `None` where the
    /// architecture has only stacks.
    pub experts_by_module: Option<Experts>,
    /// Step by step: the module of a projection, or the tensor of a norm.
    pub input_transform: Vec<StepTensors>,
    /// As `input_transform`.
    pub output_transform: Vec<StepTensors>,
    /// The dense branch.
    pub shared: Option<SharedTensors>,
    /// `[H]`: bias of the output.
    pub output_bias: Option<String>,
    /// `[H]`: norm of the output.
    pub output_norm: Option<String>,
    /// Tensors whose names begin with one of these belong to the layer: each must have a role.
    pub scopes: Vec<String>,
}

/// How experts share arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Each projection has its own array `[out, in]`.
    Each,
    /// Arrays of all experts, `[E, out, in]`.
    Stacked,
    /// Arrays of all experts, `[E, in, out]`.
    StackedTransposed,
    /// `[E·I, H]` for all three: the down projection is stored transposed (dbrx).
    Flat,
}

/// The experts of a branch: the rule that names the tensors of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many.
    pub count: usize,
    /// Number of the first of them in a stack: shared experts may stand behind the routed ones.
    pub first: usize,
    /// How many a stack holds: these, and others where it is shared.
    pub stacked: usize,
    /// I.
    pub intermediate: usize,
    /// Width of the rows they see.
    pub hidden: usize,
    /// How they share arrays.
    pub form: Form,
    /// Where gate and up are one array: its rows alternate.
    pub interleaved: bool,
    /// Module of the gate projection, `{e}` standing for the expert. The same as `up`: they are
    /// one array, gate first.
    pub gate: Option<String>,
    /// Module of the up projection.
    pub up: String,
    /// Module of the down projection.
    pub down: String,
    /// Ending of the biases' names after the module's, where there are biases.
    pub bias: Option<String>,
    /// Tensor of the norm after each expert, the same for all of them.
    pub norm: Option<String>,
}

impl Experts {
    /// The tensors of expert `index`.
    pub fn get(&self, index: usize) -> ExpertTensors {
        let fused = self.gate.as_deref() == Some(self.up.as_str());
        let stack = match self.form {
            Form::Each => None,
            form => Some(Stack {
                index: self.first + index,
                count: self.stacked,
                flat: form == Form::Flat,
            }),
        };
        let transposed = self.form == Form::StackedTransposed;
        let named = |name: &str| name.replace("{e}", &index.to_string());
        let half = |second: usize| match (fused, self.interleaved) {
            (false, _) => Part { first: 0, step: 1, of: self.intermediate, stack },
            (true, true) => Part { first: second, step: 2, of: 2 * self.intermediate, stack },
            (true, false) => Part {
                first: second * self.intermediate,
                step: 1,
                of: 2 * self.intermediate,
                stack,
            },
        };
        let first = |module: &str, part| Projection {
            module: named(module),
            rows: self.intermediate,
            cols: self.hidden,
            part,
            transposed,
        };
        let bias = |module: &str, len, part| {
            let ending = self.bias.as_ref()?;
            Some(VectorPart { tensor: named(module) + ending, len, part })
        };
        let whole = Part { stack, ..Part::whole(self.hidden) };
        ExpertTensors {
            gate: self.gate.as_deref().map(|gate| first(gate, half(0))),
            up: first(&self.up, half(1)),
            down: Projection {
                module: named(&self.down),
                rows: self.hidden,
                cols: self.intermediate,
                part: whole,
                transposed: transposed || self.form == Form::Flat,
            },
            gate_bias: self.gate.as_deref().and_then(|gate| bias(gate, self.intermediate, half(0))),
            up_bias: bias(&self.up, self.intermediate, half(1)),
            down_bias: bias(&self.down, self.hidden, whole),
            norm: self.norm.clone(),
        }
    }
}

/// One expert, routed or shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertTensors {
    /// `[I, H]`, in gated experts.
    pub gate: Option<Projection>,
    /// `[I, H]`.
    pub up: Projection,
    /// `[H, I]`.
    pub down: Projection,
    /// `[I]`.
    pub gate_bias: Option<VectorPart>,
    /// `[I]`.
    pub up_bias: Option<VectorPart>,
    /// `[H]`.
    pub down_bias: Option<VectorPart>,
    /// `[H]`: norm after the expert.
    pub norm: Option<String>,
}

/// The dense branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedTensors {
    /// The shared experts.
    pub experts: Experts,
    /// `[1, H]` or `[H]`: the scalar gate.
    pub gate: Option<String>,
    /// `[H]`.
    pub input_norm: Option<String>,
    /// `[H]`.
    pub output_norm: Option<String>,
}

/// The weights of one step of a transform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepTensors {
    /// A projection.
    Linear(Projection),
    /// A norm's tensor.
    RmsNorm(String),
}

/// One projection `[rows, cols]` = `[out, in]`, and where it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Name of the module; its tensors are called `<module>.weight`, `<module>`,
    /// `<module>.weight_packed`, `<module>_blocks`, …: that is the number format's affair.
    pub module: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Which of the stored output features.
    pub part: Part,
    /// Stored as `[in, out]`.
    pub transposed: bool,
}

/// A part of a vector, or of a stack of vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorPart {
    /// Full name of the tensor.
    pub tensor: String,
    /// Elements.
    pub len: usize,
    /// Which of the stored elements.
    pub part: Part,
}

/// Which of an array's output features: every `step`-th of `of`, from `first` on. In a stack,
/// those of matrix `stack.index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The first one.
    pub first: usize,
    /// 1, or 2 where gate and up alternate.
    pub step: usize,
    /// Output features of the stored matrix: 2·I where gate and up are stored as one.
    pub of: usize,
    /// The array holds one matrix for each expert.
    pub stack: Option<Stack>,
}

/// A place in a stack of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Which matrix.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// Stored with two dimensions, the first one being matrix and row at once.
    pub flat: bool,
}

impl Part {
    /// All of an array of `of` output features that is no stack.
    pub fn whole(of: usize) -> Self {
        Self { first: 0, step: 1, of, stack: None }
    }
}

impl Projection {
    /// A whole module `[rows, cols]`.
    pub fn whole(module: String, rows: usize, cols: usize) -> Self {
        Self { module, rows, cols, part: Part::whole(rows), transposed: false }
    }

    /// Whether an array of this shape can hold the weights, one number for each or several packed
    /// into one along the input features.
    pub(super) fn may_be_stored_as(&self, shape: &[usize]) -> bool {
        let plain = self.stored_shape();
        let mut packed = plain.clone();
        let axis = packed.len() - if self.transposed { 2 } else { 1 };
        // codes of 4 and 6 bits in bytes, of 2 to 8 bits in words
        shape == plain
            || [2, 4, 8].iter().any(|count| {
                packed[axis] = plain[axis].div_ceil(*count);
                shape == packed
            })
            || [1, 2, 3, 5, 6].iter().any(|bits| {
                packed[axis] = plain[axis] / 32 * bits;
                shape == packed
            })
            || (plain[axis].is_multiple_of(4) && {
                packed[axis] = plain[axis] / 4 * 3;
                shape == packed
            })
            // K first: GPTQ's and AWQ's words
            || (self.part.stack.is_none() && !self.transposed && shape.len() == 2)
            // blocks of MXFP4
            || (self.part.stack.is_some() && shape.len() > plain.len())
    }

    /// Shape of the stored array where it holds one number for each weight.
    pub fn stored_shape(&self) -> Vec<usize> {
        let (rows, cols) = match self.transposed {
            false => (self.part.of, self.cols),
            true => (self.cols, self.part.of),
        };
        match self.part.stack {
            None => vec![rows, cols],
            Some(Stack { count, flat: false, .. }) => vec![count, rows, cols],
            Some(Stack { count, flat: true, .. }) => vec![count * rows, cols],
        }
    }
}
