//! Requests that follow from a seed, and what is read of their answers.

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};

use crate::server::Server;

/// What the prompts are cut from.
const PROSE: &str = include_str!("../../tests/data/prose.txt");

/// A number that depends on a seed and a place.
pub fn random(seed: u64, place: &[u64]) -> u64 {
    // The finaliser of splitmix64.
    let mix = |x: u64| {
        let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    place.iter().fold(mix(seed), |hash, x| mix(hash ^ x))
}

/// One greedy request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Chat, or completion.
    pub chat: bool,
    /// Without `stream`.
    pub body: Value,
}

/// How long prompts and answers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Up to 95 words, answered by up to 30 tokens.
    Full,
    /// Up to 45 words, answered by up to 8 tokens: many requests in little time.
    Short,
}

/// One of the answers to a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// All of it, or the tool's name and arguments.
    pub text: String,
    /// Each token with its log-probability; none where a tool is called.
    pub tokens: Vec<(String, f32)>,
    /// Why it ended.
    pub finish: String,
}

/// All answers to a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// One, or as many as were asked for.
    pub choices: Vec<Choice>,
    /// Tokens of prompt and answers; 0 if it was streamed.
    pub tokens: usize,
}

/// Requests of all kinds: long and short, some with the same beginning.
pub fn asks(seed: u64, count: usize, length: Length) -> Vec<Ask> {
    (0..count).map(|i| ask(seed, i as u64, length)).collect()
}

fn ask(seed: u64, i: u64, length: Length) -> Ask {
    let (words_of_prompt, max_tokens): (&[usize], &[usize]) = match length {
        Length::Full => (&[4, 15, 40, 40, 60, 90], &[2, 8, 16, 30]),
        Length::Short => (&[4, 4, 8, 15, 40], &[1, 2, 4, 8]),
    };
    let pick = |what: u64, from: &[usize]| from[random(seed, &[9, i, what]) as usize % from.len()];
    let words: Vec<&str> = PROSE.split_whitespace().collect();
    // Few beginnings, so that prefixes are shared.
    let start = pick(0, &[0, 0, 40, 300]);
    let len = pick(1, words_of_prompt);
    let tail = random(seed, &[9, i, 2]) as usize % (words.len() - 5);
    let text = [&words[start..start + len], &words[tail..tail + 5]]
        .concat()
        .join(" ");
    // Forms and tools are chat's alone.
    let chat = matches!(i % 8, 5 | 6) || random(seed, &[9, i, 3]).is_multiple_of(2);
    let mut body =
        json!({"model": "default", "temperature": 0.0, "max_tokens": pick(4, max_tokens)});
    match chat {
        true => {
            body["messages"] = json!([{"role": "user", "content": text}]);
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(1);
        }
        false => {
            body["prompt"] = json!(text);
            body["logprobs"] = json!(1);
        }
    }
    match i % 8 {
        1 => body["stop"] = json!([" the", ".", "\n"]),
        3 => body["n"] = json!(2),
        5 => {
            let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}},
                                "required": ["name"], "additionalProperties": false});
            body["response_format"] =
                json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        }
        6 => call_a_tool(&mut body),
        _ => {}
    }
    Ask { chat, body }
}

/// Offer a tool, and allow no words but those that call it: a small model would not.
fn call_a_tool(body: &mut Value) {
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
                      "required": ["city"], "additionalProperties": false});
    let call = json!({"type": "object", "properties": {"name": {"const": "weather"}, "parameters": city},
                      "required": ["name", "parameters"], "additionalProperties": false,
                      "x-guidance": {"whitespace_flexible": false}});
    body["tools"] = json!([{"type": "function",
                            "function": {"name": "weather", "description": "Of a city", "parameters": city}}]);
    body["grammar"] = json!({"type": "json_schema", "value": call});
    body["max_tokens"] = json!(48);
    // A streamed call comes at once, with the log-probability of its last token alone.
    body["logprobs"] = json!(false);
}

impl Ask {
    fn path(&self) -> &'static str {
        match self.chat {
            true => "/v1/chat/completions",
            false => "/v1/completions",
        }
    }

    /// Ask for everything at once.
    ///
    /// # Errors
    /// If what comes is no full answer.
    pub fn answer(&self, server: &Server) -> Result<Answer> {
        let (status, done) = server.post_any(self.path(), &self.body)?;
        ensure!(status == 200, "status {status}: {done}");
        let choices = done["choices"].as_array().context("no choices")?;
        let choice = |choice: &Value| {
            let content = choice["logprobs"]["content"].as_array();
            Choice {
                text: self.text(&choice["message"], choice),
                tokens: content.into_iter().flatten().filter_map(token).collect(),
                finish: finish(choice).unwrap_or_default().to_owned(),
            }
        };
        let tokens = done["usage"]["total_tokens"].as_u64().context("no usage")?;
        let answer = Answer {
            choices: choices.iter().map(choice).collect(),
            tokens: tokens as usize,
        };
        check(answer)
    }

    /// Ask for one token after the other.
    ///
    /// # Errors
    /// If what comes is no full answer.
    pub fn streamed(&self, server: &Server) -> Result<Answer> {
        let mut answer = Answer::default();
        for event in server.events(self.path(), &self.streaming())? {
            let event = event?;
            ensure!(
                event["choices"].is_array(),
                "no chunk of an answer: {event}"
            );
            for chunk in event["choices"].as_array().into_iter().flatten() {
                let index = chunk["index"].as_u64().context("no index")? as usize;
                ensure!(index < 16, "choice {index} was not asked for");
                if answer.choices.len() <= index {
                    answer.choices.resize(index + 1, Choice::default());
                }
                let choice = &mut answer.choices[index];
                choice.text += &self.text(&chunk["delta"], chunk);
                choice.tokens.extend(token(&chunk["logprobs"]));
                if let Some(why) = finish(chunk) {
                    choice.finish = why.to_owned();
                }
            }
        }
        check(answer)
    }

    /// Read so many events of the answer, and go.
    ///
    /// # Errors
    /// If what comes is an error.
    pub fn hang_up(&self, server: &Server, events: usize) -> Result<()> {
        for event in server.events(self.path(), &self.streaming())?.take(events) {
            let event = event?;
            ensure!(
                event["choices"].is_array(),
                "no chunk of an answer: {event}"
            );
        }
        Ok(())
    }

    fn streaming(&self) -> Value {
        let mut body = self.body.clone();
        body["stream"] = json!(true);
        body
    }

    fn text(&self, message: &Value, choice: &Value) -> String {
        let text = match self.chat {
            true => &message["content"],
            false => &choice["text"],
        };
        let called = message["tool_calls"].as_array().into_iter().flatten();
        let called = called.map(|call| {
            format!(
                "{}({})",
                call["function"]["name"], call["function"]["arguments"]
            )
        });
        text.as_str().unwrap_or_default().to_owned() + &called.collect::<String>()
    }
}

fn finish(choice: &Value) -> Option<&str> {
    choice["finish_reason"].as_str()
}

/// A token as both kinds of answer tell it: streamed ones lose the blank at the answer's beginning and the text of
/// special tokens.
fn token(logprob: &Value) -> Option<(String, f32)> {
    let token = logprob["token"].as_str()?.trim_start();
    let token = if token.starts_with("<|") { "" } else { token };
    Some((token.to_owned(), logprob["logprob"].as_f64()? as f32))
}

fn check(mut answer: Answer) -> Result<Answer> {
    for choice in &mut answer.choices {
        let empty = choice.tokens.is_empty() && choice.text.is_empty();
        if choice.finish.is_empty() || empty {
            bail!("an answer is not complete: {choice:?}");
        }
        // Blanks before the first word are streamed, and left out of an answer at once.
        choice.text = choice.text.trim_start().to_owned();
    }
    ensure!(!answer.choices.is_empty(), "no answer");
    Ok(answer)
}
