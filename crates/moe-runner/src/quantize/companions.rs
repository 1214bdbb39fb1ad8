//! Which other files of a checkpoint's folder a model needs.

/// Whether a file of that name, beside the weights, is one that loading or serving a model needs:
/// how text becomes tokens and a conversation one text, how images become inputs, defaults of
/// generation, code of the model's own, and the terms it comes under. Weights, `config.json` and
/// the index are not among them; model cards, logs and whatever else lies in the folder are not
/// either.
pub fn is_companion(name: &str) -> bool {
    const NAMES: [&str; 12] = [
        "added_tokens.json",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "vocab.json",
        "vocab.txt",
        "preprocessor_config.json",
        "processor_config.json",
    ];
    /// `video_preprocessor_config.json`, `qwen.tiktoken`, `chat_template.jinja`, `modeling_x.py`
    const ENDINGS: [&str; 5] =
        ["_preprocessor_config.json", "_processor_config.json", ".tiktoken", ".jinja", ".py"];
    /// `tokenizer.json`, `tokenizer_config.json`, `tokenizer.model.v3`; `LICENSE.txt`
    const BEGINNINGS: [&str; 5] =
        ["tokenizer.", "tokenizer_config.", "LICENSE", "LICENCE", "NOTICE"];
    NAMES.contains(&name)
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
        || BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_goes_along_and_a_log_does_not() {
        for name in ["tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3", "vocab.json"]
        {
            assert!(is_companion(name), "{name}");
        }
        for name in ["modeling_minimax.py", "chat_template.jinja", "LICENSE", "qwen.tiktoken"] {
            assert!(is_companion(name), "{name}");
        }
        for name in ["README.md", "train.log", "trainer_state.json", "notes.txt", "eval.parquet"] {
            assert!(!is_companion(name), "{name}");
        }
        for name in ["config.json", "model.safetensors", "model.safetensors.index.json", "x.bin"] {
            assert!(!is_companion(name), "{name}");
        }
    }
}
