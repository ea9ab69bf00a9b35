// The page's texts in English and Chinese, and putting them and the pictures in their places.

import { icon } from "./icons.js";

const WORDS = {
  en: {
    new: "New conversation", conversations: "Conversations", conversation: "Conversation",
    close: "Close", import: "Import", language: "Language", theme: "Colours",
    automatic: "Automatic", light: "Light", dark: "Dark", settings: "Settings",
    message: "Message", result: "Result of {name}", send: "Send", stop: "Stop", down: "To the end",
    hint: "Enter sends, Shift+Enter begins a line, Escape stops", ok: "OK",
    key: "The server's API key", keyHint: "Kept in this tab until it is closed.",
    keyWrong: "The server does not know that key.",
    defaults: "Back to the defaults", untitled: "New conversation", empty: "Ask something.",
    emptyText: "This model has no chat template: it continues your text.",
    you: "You", model: "Model", tool: "Result", rename: "Rename", remove: "Delete",
    reallyRemove: "Delete “{title}”?", asJson: "Export as JSON", asMarkdown: "Export as Markdown",
    search: "Search", today: "Today", yesterday: "Yesterday", week: "The last seven days",
    earlier: "Earlier", nothingFound: "Nothing found.",
    tooLong: "{size} characters are more than a text may have here: {most}.",
    more: "More", copy: "Copy", copied: "Copied", edit: "Edit", retry: "Retry", raw: "Raw text",
    rendered: "Formatted", go_on: "Continue", cancel: "Cancel", saveSend: "Send again",
    older: "Older version", newer: "Newer version", thinking: "Thinking …",
    waiting: "In line, place {place} …", cut: "Cut off by the length limit.",
    stopped: "Stopped.", interrupted: "Interrupted.", nothing: "The model ended its answer at once.",
    leftOut: "The context is full: the model no longer sees the turns above this line.",
    tokens: "{count} tokens", perSecond: "{rate} tokens/s", first: "first after {seconds} s",
    finish_stop: "ended by itself", finish_length: "length limit", finish_tool_calls: "tool call",
    finish_abort: "ended by the server", finish_content_filter: "filtered",
    state_ok: "ready", state_busy: "busy: {running} answered, {waiting} in line",
    state_loading: "the model is loading …", state_stopping: "the server is stopping",
    state_gone: "the server does not answer", state_key: "needs a key",
    state_page: "the page's process does not answer", state_asking: "asking the server …",
    gone: "The API does not answer. Is the server running?", noAnswer: "No answer",
    broke_off: "The connection broke in the middle of the answer.",
    loading: "The model is still loading; try again in a moment.",
    page: "The page's process does not answer. Is it running?",
    otherTab: "Another tab is answering in this conversation.",
    notKept: "This browser does not keep conversations ({why}).",
    badImport: "{name} is no conversation exported from this page ({why}).",
    answered: "The answer is complete.", answering: "The answer begins.",
    model_field: "Model", system: "System prompt", temperature: "Temperature", top_p: "Top-p",
    top_k: "Top-k", repetition_penalty: "Repetition penalty", max_tokens: "Longest answer (tokens)",
    seed: "Seed", stop_field: "Stop texts, one a line", logprobs: "Probabilities of tokens",
    tools: "Tools (JSON list)", none: "none", random: "random", limit: "as the server allows",
    off: "off", badField: "{name}: {value} is not allowed; {why}",
    between: "a number from {min} to {max}", whole: "a whole number from {min} to {max}",
    badTools: "a JSON list of functions as OpenAI's API takes them",
    probabilities: "Probabilities", call: "Calls {name}",
  },
  zh: {
    new: "新对话", conversations: "对话列表", conversation: "对话", close: "关闭", import: "导入",
    language: "语言", theme: "配色", automatic: "自动", light: "浅色", dark: "深色", settings: "设置",
    message: "输入消息", result: "{name} 的结果", send: "发送", stop: "停止", down: "到末尾",
    hint: "Enter 发送，Shift+Enter 换行，Esc 停止", ok: "确定",
    key: "服务器的 API 密钥", keyHint: "只保存在本标签页，关闭后清除。",
    keyWrong: "服务器不认识该密钥。",
    defaults: "恢复默认值", untitled: "新对话", empty: "问点什么吧。",
    emptyText: "该模型没有对话模板：它会接着您的文字往下写。",
    you: "您", model: "模型", tool: "结果", rename: "重命名", remove: "删除",
    reallyRemove: "删除“{title}”？", asJson: "导出为 JSON", asMarkdown: "导出为 Markdown",
    search: "搜索", today: "今天", yesterday: "昨天", week: "过去七天", earlier: "更早",
    nothingFound: "没有找到。", tooLong: "{size} 个字符超过了此处文本的上限 {most}。",
    more: "更多", copy: "复制", copied: "已复制", edit: "编辑", retry: "重试", raw: "原文",
    rendered: "排版", go_on: "继续", cancel: "取消", saveSend: "重新发送",
    older: "上一个版本", newer: "下一个版本", thinking: "思考中……",
    waiting: "排队中，第 {place} 位……", cut: "已达长度上限，回答被截断。",
    stopped: "已停止。", interrupted: "已中断。", nothing: "模型没有输出任何内容就结束了。",
    leftOut: "上下文已满：模型看不到此线以上的内容。",
    tokens: "{count} 个词元", perSecond: "每秒 {rate} 个词元", first: "首个词元 {seconds} 秒",
    finish_stop: "自然结束", finish_length: "长度上限", finish_tool_calls: "工具调用",
    finish_abort: "被服务器结束", finish_content_filter: "被过滤",
    state_ok: "就绪", state_busy: "繁忙：正在回答 {running} 个，排队 {waiting} 个",
    state_loading: "模型加载中……", state_stopping: "服务器正在停止",
    state_gone: "服务器没有响应", state_key: "需要密钥",
    state_page: "页面进程没有响应", state_asking: "正在询问服务器……",
    gone: "API 没有响应。服务器在运行吗？", noAnswer: "没有回答",
    broke_off: "回答途中连接断开。", loading: "模型仍在加载，请稍后再试。",
    page: "页面进程没有响应。它在运行吗？", otherTab: "另一个标签页正在此对话中回答。",
    notKept: "此浏览器无法保存对话（{why}）。", badImport: "{name} 不是本页面导出的对话（{why}）。",
    answered: "回答完成。", answering: "开始回答。",
    model_field: "模型", system: "系统提示词", temperature: "温度", top_p: "Top-p",
    top_k: "Top-k", repetition_penalty: "重复惩罚", max_tokens: "最长回答（词元）",
    seed: "随机种子", stop_field: "停止文本，每行一个", logprobs: "词元概率",
    tools: "工具（JSON 列表）", none: "无", random: "随机", limit: "由服务器决定", off: "关",
    badField: "{name}：不能是 {value}；应为{why}",
    between: "{min} 到 {max} 之间的数", whole: "{min} 到 {max} 之间的整数",
    badTools: "OpenAI 接口格式的函数 JSON 列表",
    probabilities: "概率", call: "调用 {name}",
  },
};

let chosen = "en";

// Takes "en", "zh", or "" for the browser's language.
export function speak(language) {
  chosen = language || (/^zh/i.test(navigator.language) ? "zh" : "en");
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  place(document.body);
}

export function has(name) {
  return name in WORDS.en;
}

export function t(name, values = {}) {
  return WORDS[chosen][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

// Fills the texts, labels and placeholders of an element's children.
export function place(element) {
  for (const each of element.querySelectorAll("[data-icon]")) {
    if (!each.querySelector(":scope > .picture")) each.prepend(icon(each.dataset.icon));
  }
  for (const each of element.querySelectorAll("[data-word]")) each.textContent = t(each.dataset.word);
  for (const each of element.querySelectorAll("[data-label]")) label(each, t(each.dataset.label));
  for (const each of element.querySelectorAll("[data-placeholder]")) {
    each.placeholder = t(each.dataset.placeholder);
  }
}

function label(element, text) {
  element.setAttribute("aria-label", text);
  if (element.matches("button")) element.title = text;
}
