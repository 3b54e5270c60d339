//! The caches that a soak goes through, one for each round.

use integration_tests::bed::Length;

/// A server, and up to how many tokens its answers are what they are alone.
pub struct Round {
    /// What `--kv-cache` is given; `None` for the host's own cache.
    pub cache: Option<&'static str>,
    /// Tokens in the pool for full requests, and for short ones.
    pub pool: [usize; 2],
    /// Whether prompts may hit what others stored.
    pub hits: bool,
    /// Longer answers are not compared.
    pub judged_tokens: usize,
}

/// With a backend. Pools are too small for all who run at once, but where that would move the numbers.
pub const BACKENDS: [Round; 5] = [
    // Blocks of 16 tokens, and few: waiting, preemption, eviction all the time.
    Round {
        cache: Some("toy-f32:block=16"),
        pool: [640, 320],
        hits: true,
        judged_tokens: usize::MAX,
    },
    // Nothing is hit or preempted, so that the numbers stored do not depend on others.
    Round {
        cache: Some("ott"),
        pool: [8192, 8192],
        hits: false,
        judged_tokens: usize::MAX,
    },
    // What fits into one block is never hit, and stays in the window.
    Round {
        cache: Some("ott"),
        pool: [1024, 768],
        hits: true,
        judged_tokens: 127,
    },
    Round {
        cache: Some("ott:group=32"),
        pool: [512, 256],
        hits: true,
        judged_tokens: 31,
    },
    // Two steps of each hundred fail, once the storm has begun.
    Round {
        cache: Some("toy-faulty:fail_layer=2,fail_after_steps=600,fail_times=2,fail_every=100"),
        pool: [640, 320],
        hits: true,
        judged_tokens: usize::MAX,
    },
];

/// Without one: what is compared is the host's own cache.
pub const HOST: [Round; 1] = [Round {
    cache: None,
    pool: [0, 0],
    hits: true,
    judged_tokens: usize::MAX,
}];

impl Round {
    /// Whether the server must have the toys.
    pub fn is_toy(&self) -> bool {
        self.cache.is_some_and(|cache| cache.starts_with("toy"))
    }

    /// Whether steps fail as asked.
    pub fn is_faulty(&self) -> bool {
        self.cache
            .is_some_and(|cache| cache.starts_with("toy-faulty"))
    }

    fn pool(&self, length: Length) -> usize {
        self.pool[usize::from(length == Length::Short)]
    }

    /// The server's arguments.
    pub fn options(&self, length: Length, max_seqs: usize) -> Vec<String> {
        let mut options = vec!["--max-seqs".to_owned(), max_seqs.to_string()];
        if let Some(cache) = self.cache {
            let pool = self.pool(length).to_string();
            options.extend(["--kv-cache", cache, "--pa-context-len", &pool].map(String::from));
        }
        if !self.hits {
            options.extend(["--prefix-cache-n", "0"].map(String::from));
        }
        options
    }

    /// What a reader calls it.
    pub fn name(&self, length: Length) -> String {
        match self.cache {
            Some(cache) => format!("{cache}, pool of {}", self.pool(length)),
            None => "the host's own cache".to_owned(),
        }
    }
}
