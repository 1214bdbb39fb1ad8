//! `quant_method: "gptq"` and `"awq"`: 4-bit (and GPTQ's 8-bit) integers, K first.

use super::pattern::Pattern;
use super::{Rule, Rules, Scheme, Unsupported, WeightScheme, patterns};
use crate::Result;
use crate::checkpoint::Config;

pub(super) fn gptq(config: &Config) -> Result<Rules> {
    let default = Options {
        bits: config.usize("bits")?.ok_or_else(|| config.missing("bits"))?,
        group: group(config, "group_size")?.ok_or_else(|| config.missing("group_size"))?,
        symmetric: config.bool("sym")?.unwrap_or(true),
    };
    let zeros_less_one = match config.str("checkpoint_format")?.unwrap_or("gptq") {
        "gptq" => true,
        "gptq_v2" => false,
        other => {
            let reason = format!("is '{other}'; supported are 'gptq' and 'gptq_v2'");
            return Err(config.error("checkpoint_format", reason));
        }
    };
    let mut rules = Vec::new();
    if let Some(dynamic) = config.sub("dynamic")? {
        // the configuration's keys are expressions: `-:` leaves modules alone, `+:` or nothing
        // gives them other options
        for expression in dynamic.keys() {
            let (exempt, pattern) = match expression.split_once(':') {
                Some(("-", pattern)) => (true, pattern),
                Some(("+", pattern)) => (false, pattern),
                _ => (false, expression),
            };
            let scheme = match dynamic.entry(expression)? {
                _ if exempt => Ok(Scheme::FLOAT),
                None => default.scheme(zeros_less_one),
                Some(own) => Options {
                    bits: own.usize("bits")?.unwrap_or(default.bits),
                    group: group(&own, "group_size")?.unwrap_or(default.group),
                    symmetric: own.bool("sym")?.unwrap_or(default.symmetric),
                }
                .scheme(zeros_less_one),
            };
            let modules = vec![Pattern::regex(config, "dynamic", pattern)?];
            rules.push(Rule { modules, scheme });
        }
    }
    rules.push(Rule { modules: vec![Pattern::All], scheme: default.scheme(zeros_less_one) });
    let ignored = patterns(config, "modules_to_not_convert", Pattern::components)?;
    Ok(Rules { ignored, rules })
}

#[derive(Clone, Copy)]
struct Options {
    bits: usize,
    group: Option<usize>,
    symmetric: bool,
}

impl Options {
    fn scheme(self, zeros_less_one: bool) -> std::result::Result<Scheme, Unsupported> {
        let Self { bits, group, symmetric } = self;
        if !matches!(bits, 4 | 8) {
            return Err(Unsupported::new("bits", format!("is {bits}; supported are 4 and 8")));
        }
        let weights = WeightScheme::Gptq { bits, group, symmetric, zeros_less_one };
        Ok(Scheme::weights_only(weights))
    }
}

/// AutoRound: the tensors of GPTQ or AWQ, with exceptions by name in `extra_config`.
pub(super) fn auto_round(config: &Config) -> Result<Rules> {
    const PACKING: &str = "packing_format";
    let default = Options {
        bits: config.usize("bits")?.ok_or_else(|| config.missing("bits"))?,
        group: group(config, "group_size")?.ok_or_else(|| config.missing("group_size"))?,
        symmetric: config.bool("sym")?.unwrap_or(true),
    };
    let packing = config.str(PACKING)?.unwrap_or("auto_round:auto_gptq");
    let awq = match packing.split(':').next_back().unwrap_or_default() {
        "auto_gptq" | "gptq" | "auto_round" => false,
        "auto_awq" | "awq" => true,
        other => {
            let reason = format!("is '{other}'; supported are 'auto_gptq' and 'auto_awq'");
            return Err(config.error(PACKING, reason));
        }
    };
    let scheme = |options: Options| match (awq, options.bits) {
        (_, 16..) => Ok(Scheme::FLOAT),
        (false, _) => options.scheme(true),
        (true, 4) => Ok(Scheme::weights_only(WeightScheme::KFirst {
            group: options.group,
            symmetric: false,
            interleaved: true,
            signed: false,
        })),
        (true, bits) => Err(Unsupported::new("bits", format!("is {bits}; supported is 4"))),
    };
    let mut rules = Vec::new();
    if let Some(extra) = config.sub("extra_config")? {
        for name in extra.keys() {
            let Some(own) = extra.entry(name)? else { continue };
            let options = Options {
                bits: own.usize("bits")?.unwrap_or(default.bits),
                group: group(&own, "group_size")?.unwrap_or(default.group),
                symmetric: own.bool("sym")?.unwrap_or(default.symmetric),
            };
            let pattern = match name.contains(['*', '(', '|', '\\']) {
                true => Pattern::regex(config, "extra_config", name)?,
                false => Pattern::Name(name.to_string()),
            };
            rules.push(Rule { modules: vec![pattern], scheme: scheme(options) });
        }
    }
    rules.push(Rule { modules: vec![Pattern::All], scheme: scheme(default) });
    let ignored = patterns(config, "modules_to_not_convert", Pattern::components)?;
    Ok(Rules { ignored, rules })
}

/// The size at `key`; −1 is all of a row.
fn group(config: &Config, key: &str) -> Result<Option<Option<usize>>> {
    match config.i64(key)? {
        None => Ok(None),
        Some(-1) => Ok(Some(None)),
        Some(size) if size >= 1 => match usize::try_from(size) {
            Ok(size) => Ok(Some(Some(size))),
            Err(_) => Err(config.error(key, format!("is {size}"))),
        },
        Some(other) => {
            Err(config.error(key, format!("is {other}; it must be −1 (all of a row) or positive")))
        }
    }
}

pub(super) fn awq(config: &Config) -> Result<Rules> {
    let either = |a: &'static str, b: &'static str| match config.get(a) {
        Some(_) => a,
        None => b,
    };
    let key = either("bits", "w_bit");
    let bits = config.usize(key)?.ok_or_else(|| config.missing("bits"))?;
    let size = either("group_size", "q_group_size");
    let group = group(config, size)?.ok_or_else(|| config.missing("group_size"))?;
    let scheme = match (bits, config.str("version")?.map(str::to_lowercase).as_deref()) {
        (4, None | Some("gemm")) => Ok(Scheme::weights_only(WeightScheme::KFirst {
            group,
            symmetric: !config.bool("zero_point")?.unwrap_or(true),
            interleaved: true,
            signed: false,
        })),
        (4, Some(other)) => {
            Err(Unsupported::new("version", format!("is '{other}'; supported is 'gemm'")))
        }
        (bits, _) => Err(Unsupported::new(key, format!("is {bits}; supported is 4"))),
    };
    let ignored = patterns(config, "modules_to_not_convert", Pattern::components)?;
    Ok(Rules::all(ignored, scheme))
}
