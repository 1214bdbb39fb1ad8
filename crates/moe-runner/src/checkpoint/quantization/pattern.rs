//! Names and patterns of modules, in the ways that configurations write them.

use fancy_regex::Regex;

use crate::Result;
use crate::checkpoint::Config;

/// Which modules something is said about.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// All.
    All,
    /// The one of this name.
    Name(String),
    /// Those that the expression matches.
    Regex(Regex),
}

impl Pattern {
    /// Whether it matches the full name `module`. An expression that cannot decide within its
    /// bounds on backtracking does not match.
    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::All => true,
            Self::Name(name) => name == module,
            Self::Regex(regex) => regex.is_match(module).unwrap_or(false),
        }
    }

    /// A full name, or `re:` and an expression that must match from the name's start on (Python's
    /// `re.match`): compressed-tensors.
    pub(super) fn name_or_regex(config: &Config, key: &str, text: &str) -> Result<Self> {
        match text.strip_prefix("re:") {
            Some(expression) => Self::regex(config, key, expression),
            None => Ok(Self::Name(text.to_string())),
        }
    }

    /// An expression that must match from the name's start on.
    pub(super) fn regex(config: &Config, key: &str, expression: &str) -> Result<Self> {
        Self::compile(config, key, &format!("^(?:{expression})"), expression)
    }

    /// A name with `*`, `?` and `[…]` for the whole name (Python's `fnmatch`): ModelOpt, Quark. A
    /// name without them also covers the modules below it.
    pub(super) fn glob(config: &Config, key: &str, text: &str) -> Result<Self> {
        let below = if text.contains(['*', '?', '[']) { "" } else { r"(?:\..*)?" };
        Self::compile(config, key, &format!("^(?:{}){below}$", translate(text)), text)
    }

    /// One or several components of the name's path, `*` standing for anything: `mlp.gate` matches
    /// `model.layers.0.mlp.gate`, but not `model.layers.0.mlp.gate_proj`.
    pub(super) fn components(config: &Config, key: &str, text: &str) -> Result<Self> {
        Self::compile(config, key, &format!(r"(?:^|\.){}(?:\.|$)", translate(text)), text)
    }

    fn compile(config: &Config, key: &str, expression: &str, shown: &str) -> Result<Self> {
        Regex::new(expression).map(Self::Regex).map_err(|error| {
            config.error(key, format!("has '{shown}', which is no usable pattern: {error}"))
        })
    }
}

/// The expression for a pattern of `fnmatch`.
fn translate(glob: &str) -> String {
    let mut expression = String::new();
    let mut rest = glob.chars();
    while let Some(c) = rest.next() {
        let set = rest.as_str().split_once(']').map(|(set, _)| set).filter(|set| !set.is_empty());
        match (c, set) {
            ('*', _) => expression.push_str(".*"),
            ('?', _) => expression.push('.'),
            ('[', Some(set)) => {
                let (not, set) = match set.strip_prefix('!') {
                    Some(set) => ("^", set),
                    None => ("", set),
                };
                let escaped = set.replace('\\', r"\\").replace('[', r"\[").replace('^', r"\^");
                expression.push_str(&format!("[{not}{escaped}]"));
                rest.by_ref().find(|c| *c == ']');
            }
            (c, _) => expression.push_str(&fancy_regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    expression
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::new("config.json".as_ref(), serde_json::json!({}))
    }

    #[test]
    fn each_way_matches_what_its_origin_says() {
        let config = &config();
        let layer = "model.layers.12.mlp.";
        let cases: &[(Pattern, &str, bool)] = &[
            (Pattern::name_or_regex(config, "", "re:.*mlp.gate$").unwrap(), "gate", true),
            (Pattern::name_or_regex(config, "", "re:.*mlp.gate$").unwrap(), "gate_proj", false),
            (Pattern::name_or_regex(config, "", "re:mlp").unwrap(), "gate", false),
            // what the expressions of config files need and finite automata cannot do
            (Pattern::name_or_regex(config, "", "re:^(?!.*experts)").unwrap(), "gate", true),
            (Pattern::name_or_regex(config, "", "re:^(?!.*experts)").unwrap(), "experts.0", false),
            (Pattern::name_or_regex(config, "", "model.layers.12.mlp.gate").unwrap(), "gate", true),
            (Pattern::name_or_regex(config, "", "model.layers.12.mlp").unwrap(), "gate", false),
            (Pattern::glob(config, "", "model.layers.12.mlp").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.12.mlp*").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.1*.gate").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.1?.mlp.gat[a-e]").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.1?.mlp.gat[!a-e]").unwrap(), "gate", false),
            (Pattern::glob(config, "", "layers.12.mlp.gate").unwrap(), "gate", false),
            (Pattern::glob(config, "", "model_layers*").unwrap(), "gate", false),
            (Pattern::components(config, "", "mlp.gate").unwrap(), "gate", true),
            (Pattern::components(config, "", "mlp.gate").unwrap(), "gate_proj", false),
            (Pattern::components(config, "", "model.layers.*.mlp.router").unwrap(), "router", true),
            (Pattern::components(config, "", "lm_head").unwrap(), "gate", false),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(pattern.matches(&format!("{layer}{name}")), *expected, "{pattern:?} {name}");
        }
    }

    #[test]
    fn a_broken_expression_is_an_error_that_shows_it() {
        let error = Pattern::name_or_regex(&config(), "ignore", "re:(").unwrap_err().to_string();
        assert!(error.contains("'ignore': has '('"), "{error}");
    }
}
