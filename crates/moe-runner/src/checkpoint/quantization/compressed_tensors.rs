//! `quant_method: "compressed-tensors"`: groups of modules, each with arguments for weights and
//! input activations.

use super::pattern::Pattern;
use super::{
    InputScheme, MxElement, Number, Rule, Rules, ScaleShape, Scheme, Unsupported, WeightScheme,
    block_size, patterns, positive,
};
use crate::Result;
use crate::checkpoint::Config;

type Outcome<T> = std::result::Result<T, Unsupported>;

pub(super) fn read(config: &Config) -> Result<Rules> {
    if let Some(sparsity) = config.str("sparsity_config.format")?
        && sparsity != "dense"
    {
        let reason = format!("is '{sparsity}'; sparse weights are not supported");
        return Err(config.error("sparsity_config.format", reason));
    }
    if let Some(transforms) = config.sub("transform_config.config_groups")?
        && transforms.keys().next().is_some()
    {
        let reason = "asks for transforms of activations at run time, which are not supported";
        return Err(config.error("transform_config.config_groups", reason));
    }
    let groups = config.sub("config_groups")?.ok_or_else(|| config.missing("config_groups"))?;
    // a module's own name counts before the name of its class, and experts' before that of all
    let (mut by_name, mut experts, mut by_class) = (Vec::new(), Vec::new(), Vec::new());
    for name in groups.keys() {
        let Some(group) = groups.entry(name)? else { continue };
        let scheme = group_scheme(config, &group)?;
        let targets = group.str_list("targets")?.ok_or_else(|| group.missing("targets"))?;
        let (classes, names): (Vec<&str>, Vec<&str>) =
            targets.into_iter().partition(|target| is_class(target) || is_experts(target));
        let modules = names
            .into_iter()
            .map(|name| Pattern::name_or_regex(&group, "targets", name))
            .collect::<Result<Vec<_>>>()?;
        by_name.push(Rule { modules, scheme: scheme.clone() });
        if classes.iter().any(|target| is_experts(target)) {
            experts.push(Rule { modules: vec![Pattern::Experts], scheme: scheme.clone() });
        }
        if classes.iter().any(|target| is_class(target)) {
            by_class.push(Rule { modules: vec![Pattern::All], scheme });
        }
    }
    by_name.append(&mut experts);
    by_name.append(&mut by_class);
    let ignored = patterns(config, "ignore", Pattern::name_or_regex)?;
    Ok(Rules { ignored, rules: by_name })
}

/// Whether a target is the name of a class of modules that projections belong to: an identifier,
/// which no module of a model's layers has as its full name.
fn is_class(target: &str) -> bool {
    !target.starts_with("re:") && !target.contains('.') && target.ends_with("Linear")
}

/// Whether a target is the name of a class of modules that hold routed experts.
fn is_experts(target: &str) -> bool {
    let identifier = !target.starts_with("re:") && !target.contains('.');
    identifier && (target.ends_with("Experts") || target.ends_with("MoE"))
}

/// Arguments of one kind of tensor.
struct Args {
    bits: usize,
    float: bool,
    strategy: String,
    group: Option<usize>,
    block: Option<[usize; 2]>,
    symmetric: bool,
    dynamic: Dynamic,
    /// Scales are bytes: powers of two.
    powers: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Dynamic {
    No,
    Yes,
    /// Groups dynamic, the global scale stored.
    Local,
}

impl Args {
    fn read(args: &Config) -> Result<Self> {
        let float = match args.str("type")? {
            None | Some("int") => false,
            Some("float") => true,
            Some(other) => {
                return Err(args.error("type", format!("is '{other}', not 'int' or 'float'")));
            }
        };
        let dynamic = match args.get("dynamic").and_then(|v| v.as_str()) {
            Some("local") => Dynamic::Local,
            _ => match args.bool("dynamic")?.unwrap_or(false) {
                true => Dynamic::Yes,
                false => Dynamic::No,
            },
        };
        let group = positive(args, "group_size").or_else(|error| {
            // −1 is how some write that there is no group
            if args.i64("group_size")? == Some(-1) { Ok(None) } else { Err(error) }
        })?;
        let block = block(args)?;
        let strategy = match args.str("strategy")? {
            Some(strategy) => strategy.to_string(),
            None if group.is_some() => "group".into(),
            None => "tensor".into(),
        };
        Ok(Self {
            bits: args.usize("num_bits")?.unwrap_or(8),
            float,
            strategy,
            group,
            block,
            symmetric: args.bool("symmetric")?.unwrap_or(true),
            dynamic,
            powers: args.str("scale_dtype")?.is_some_and(|t| t.ends_with("uint8")),
        })
    }

    fn is(&self, float: bool, bits: usize) -> bool {
        self.float == float && self.bits == bits
    }

    fn grouped(&self, size: usize) -> bool {
        self.strategy == "group" && self.group == Some(size)
    }

    fn describe(&self) -> String {
        let kind = if self.float { "float" } else { "int" };
        let dynamic = match self.dynamic {
            Dynamic::No => "static",
            Dynamic::Yes => "dynamic",
            Dynamic::Local => "local",
        };
        let symmetric = if self.symmetric { "symmetric" } else { "asymmetric" };
        let group = self.group.map_or(String::new(), |size| format!(" {size}"));
        format!("{dynamic} {symmetric} {kind}{} per {}{group}", self.bits, self.strategy)
    }
}

/// `block_structure`: a list, or two numbers with `x` between them.
fn block(args: &Config) -> Result<Option<[usize; 2]>> {
    const KEY: &str = "block_structure";
    let sizes = match args.get(KEY).and_then(|v| v.as_str()) {
        Some(text) => text.split('x').map(|n| n.trim().parse().ok()).collect(),
        None => args.usize_list(KEY)?,
    };
    match (args.get(KEY), sizes.as_deref().and_then(block_size)) {
        (None, _) => Ok(None),
        (_, Some(block)) => Ok(Some(block)),
        (Some(value), _) => {
            Err(args.error(KEY, format!("is {value}; it must be the rows and columns of a block")))
        }
    }
}

fn group_scheme(config: &Config, group: &Config) -> Result<Outcome<Scheme>> {
    let Some(weights) = group.sub("weights")? else { return Ok(Ok(Scheme::FLOAT)) };
    let weights = Args::read(&weights)?;
    let input = match group.sub("input_activations")? {
        Some(input) => Some(Args::read(&input)?),
        None => None,
    };
    let format = match group.str("format")? {
        Some(format) => Some(format),
        None => config.str("format")?,
    };
    Ok(weight_scheme(&weights, format.unwrap_or_default()).and_then(|weights| {
        let input = match &input {
            Some(input) => input_scheme(input, weights)?,
            None => InputScheme::None,
        };
        Ok(Scheme { weights, input })
    }))
}

fn weight_scheme(args: &Args, format: &str) -> Outcome<WeightScheme> {
    const KEY: &str = "config_groups.*.weights";
    let unsupported = |what: &str| {
        Unsupported::new(
            KEY,
            format!(
                "are {} in the format '{format}'{what}; supported are float 4 (groups of 16 with a \
                 tensor's scale, groups of 32), float 8 (tensor, channel, group, block), int 8 and \
                 int 4 (tensor, channel, group), static",
                args.describe()
            ),
        )
    };
    if args.dynamic != Dynamic::No {
        return Err(unsupported(""));
    }
    if format.contains("marlin") || format.contains("sparse") || format.contains("24") {
        return Err(unsupported(", which is not supported"));
    }
    let scales = match (args.strategy.as_str(), args.group, args.block) {
        ("tensor", ..) => ScaleShape::Tensor,
        ("channel", ..) => ScaleShape::Channel,
        ("group" | "tensor_group", Some(size), _) => ScaleShape::Group(size),
        ("block", _, Some(block)) => ScaleShape::Block(block),
        _ => return Err(unsupported("")),
    };
    if args.is(true, 4) && args.symmetric {
        return match args.strategy.as_str() {
            "tensor_group" if args.group == Some(16) => Ok(WeightScheme::Nvfp4),
            "group" if args.group == Some(32) => Ok(WeightScheme::Mx(MxElement::Fp4)),
            _ => Err(unsupported("")),
        };
    }
    if args.is(true, 8) && args.symmetric && args.strategy != "tensor_group" {
        let mx = args.grouped(32) && (args.powers || format.starts_with("mxfp8"));
        return Ok(match mx {
            true => WeightScheme::Mx(MxElement::Fp8),
            false => WeightScheme::Codes { number: Number::Fp8, scales },
        });
    }
    let integers = !args.float && matches!(args.bits, 4 | 8) && args.strategy != "tensor_group";
    match format {
        "pack-quantized" if integers && !matches!(scales, ScaleShape::Block(_)) => {
            Ok(WeightScheme::Packed { bits: args.bits, scales, symmetric: args.symmetric })
        }
        "int-quantized" | "naive-quantized" if integers => {
            let number = if args.bits == 4 { Number::Int4 } else { Number::Int8 };
            Ok(WeightScheme::Codes { number, scales })
        }
        _ => Err(unsupported("")),
    }
}

fn input_scheme(args: &Args, weights: WeightScheme) -> Outcome<InputScheme> {
    let unsupported = || {
        Unsupported::new(
            "config_groups.*.input_activations",
            format!(
                "are {}; supported are float 8 (static tensor; dynamic tensor, token, group), int \
                 8 (static symmetric tensor; dynamic tensor, token, group), float 4 (groups of 16 \
                 with a tensor's scale, groups of 32)",
                args.describe()
            ),
        )
    };
    let powers = args.powers || weights == WeightScheme::Mx(MxElement::Fp8);
    Ok(match (args.strategy.as_str(), args.dynamic, args.group) {
        ("group", Dynamic::Yes, Some(32)) if args.is(true, 8) && powers => {
            InputScheme::Mx(MxElement::Fp8)
        }
        ("group", Dynamic::Yes, Some(size)) if args.is(true, 8) => {
            InputScheme::Fp8Group { size, power_of_two: false }
        }
        ("token" | "tensor", Dynamic::Yes, _) if args.is(true, 8) => InputScheme::Fp8Token,
        ("tensor", Dynamic::No, _) if args.is(true, 8) && args.symmetric => InputScheme::Fp8Static,
        ("group", Dynamic::Yes, Some(size)) if args.is(false, 8) => InputScheme::Int8Group(size),
        // asymmetric dynamic activations are computed as symmetric ones, as engines do
        ("token" | "tensor", Dynamic::Yes, _) if args.is(false, 8) => InputScheme::Int8Token,
        ("tensor", Dynamic::No, _) if args.is(false, 8) && args.symmetric => {
            InputScheme::Int8Static
        }
        ("tensor_group", Dynamic::Local, Some(16)) if args.is(true, 4) => InputScheme::Nvfp4,
        ("tensor_group", Dynamic::Yes, Some(16)) if args.is(true, 4) => InputScheme::Nvfp4Token,
        ("group", Dynamic::Yes, Some(32)) if args.is(true, 4) => InputScheme::Mx(MxElement::Fp4),
        _ => return Err(unsupported()),
    })
}
